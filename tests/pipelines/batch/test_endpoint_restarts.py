"""A real endpoint that is killed in the middle of a job: it comes back as the same model, and then as another."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from hydra_core.base import Base
from hydra_core.decoding import naive_generate
from hydra_core.sampling import Request
from pipelines.batch.writer import read_batch_rows
from tests.pipelines.batch.test_stage import write_rows
from tests.pipelines.serve.test_stage import command_for, environment_of, free_port
from tests.tiny import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.drawn]
ROWS, TOKENS, PART = 240, 150, 4
START_SECONDS = 600.0
"""In which an endpoint starts, on a machine on which everything else runs too."""


def ended(process: subprocess.Popen[str]) -> None:
    """Kill it with its Ray and all its processes."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def until(found: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    end = time.monotonic() + START_SECONDS
    while not found():
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def test_an_endpoint_that_comes_back_goes_on_and_another_model_ends_the_job(
        tiny_base_dir: Path, tiny_base: Base, storage: Path, tmp_path: Path, worker_env: dict[str, str]) -> None:
    """Away for as long as a start takes, some tens of seconds: no row is refused meanwhile, and what the other model says is not
    written."""
    path, output, port = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "out", free_port()
    environment, url = environment_of(worker_env), f"http://127.0.0.1:{port}"
    other = save_tiny(tmp_path / "other", seed=1)
    processes: list[subprocess.Popen[str]] = []

    def start(base: Path) -> subprocess.Popen[str]:
        # two at once: the job is not over before the kill
        processes.append(subprocess.Popen([*command_for(storage, base, port), "serve.max_batch_size=2"], env=environment,
                                          start_new_session=True, text=True, stdout=subprocess.DEVNULL,
                                          stderr=subprocess.DEVNULL))
        return processes[-1]

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/ready", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def written() -> int:
        return len(list(output.glob("rows/part-*")))

    settings = [f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32", f"batch.address={url}",
                f"batch.input={path}", f"batch.output={output}", f"batch.max_new_tokens={TOKENS}", f"batch.rows_per_file={PART}",
                "batch.concurrency=2"]
    try:
        endpoint = start(tiny_base_dir)
        until(ready, endpoint)
        job = subprocess.Popen([sys.executable, "-m", "jobs.batch", *settings], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        processes.append(job)
        until(lambda: written() > 2, job)
        ended(endpoint)
        until(lambda: not listens(port), job)
        before = written()
        again = start(tiny_base_dir)
        until(lambda: written() > before + 4, job)  # more than an engine may have held
        ended(again)
        until(lambda: not listens(port), job)
        start(other)
        _, told = job.communicate(timeout=START_SECONDS)
        assert job.returncode == 1 and "Traceback" not in told, told[-3000:]
        assert "answers with another model now" in told.splitlines()[-1], told[-3000:]
    finally:
        for process in processes:
            if process.poll() is None:
                ended(process)
    assert 0 < written() * PART < ROWS and not list(output.glob("errors/part-*"))
    rows = list(read_batch_rows(output / "rows", "jsonl"))
    assert len(rows) == len({row["id"] for row in rows})
    for row in rows[::8]:  # those of the first two lives alike
        prompt = tuple(tiny_base.encode_prompt(f"question {int(str(row['row'])) - 1}"))
        assert row["text"] == tiny_base.decode(naive_generate(tiny_base, Request("x", prompt, TOKENS)).token_ids)
