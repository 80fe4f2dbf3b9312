"""What dies in the middle of `batch`, or breaks: every row is answered once all the same, and nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from ray import serve

from hydra_core.base import Base
from hydra_core.decoding import Engine, StepOutput, naive_generate
from hydra_core.sampling import Request
from pipelines.batch.backend import RequestSettings
from pipelines.batch.backends import open_backend
from pipelines.batch.reader import BatchRow
from pipelines.batch.stage import run_batch
from pipelines.batch.worker import BatchSettings, BatchWorker
from pipelines.batch.writer import Output, read_batch_rows
from pipelines.config import RunConfig
from pipelines.serve.messages import AppArgs
from pipelines.serve.stage import start_app
from tests.pipelines.batch.test_stage import config_for, read_batch_errors, write_rows
from tests.pipelines.serve.test_stage import free_port
from tests.processes import children

pytestmark = [pytest.mark.slow, pytest.mark.drawn]


@contextmanager
def asked_through(how: str, make: Callable[..., RunConfig]) -> Iterator[dict[str, object]]:
    """The settings for a way to ask: `serve`, an application of the job's own; `embedded`; `http`, of an application that
    runs here for as long as the block."""
    if how != "http":
        yield {"batch__engine": how}
        return
    app = start_app(make())
    try:
        yield {"batch__address": app.url}
    finally:
        app.stop()


def check_answers(base: Base, rows: list[dict[str, object]], count: int, tokens: int, spread: int) -> None:
    """Every row once; of every `spread`th, the base's own answer."""
    assert len(rows) == count == len({row["id"] for row in rows}) and {row["row"] for row in rows} == set(range(1, count + 1))
    for row in rows[::spread]:
        prompt = tuple(base.encode_prompt(f"question {int(str(row['row'])) - 1}"))
        assert row["text"] == base.decode(naive_generate(base, Request("x", prompt, tokens)).token_ids)


REPLICA, WORKER = ("ServeReplica:hydra-heads", "DecodeServer"), ("ray::MapWorker",)


@pytest.mark.parametrize(("ways", "words"), [(("serve", "http"), REPLICA), (("embedded",), WORKER)],
                         ids=["replica", "worker"])
def test_a_killed_replica_or_worker_costs_no_row(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                                 moment: random.Random, ways: tuple[str, ...], words: tuple[str, ...]) -> None:
    """At a random moment from its start on; its queue is full all the while. One of the ways to ask is drawn."""
    how = moment.choice(ways)
    print(f"asked through {how}")
    path = write_rows(storage.parent / "in.jsonl", 150)
    make: Callable[..., RunConfig] = lambda **changes: config_for(  # noqa: E731
        storage, tiny_base_dir, batch__input=str(path), batch__rows_per_file=4, batch__concurrency=16, serve__max_batch_size=2,
        serve__max_queued=1, serve__replicas=2, batch__max_new_tokens=60, batch__output=str(storage / "out"), **changes)
    killed: list[psutil.Process] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while len(children(*words)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moment.uniform(0, 4))
        for child in children(*words)[:1]:
            child.kill()
            killed.append(child)

    with asked_through(how, make) as settings:
        killer = threading.Thread(target=kill)
        killer.start()
        result = run_batch(make(**settings))
        killer.join()
    assert killed
    assert (result.figures["rows"], result.figures["errors"]) == (150, 0)
    check_answers(tiny_base, list(read_batch_rows(Path(result.outputs["rows"]), "jsonl")), 150, 60, 30)


def test_killed_job_goes_on(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path, worker_env: dict[str, str],
                            moment: random.Random) -> None:
    """Killed with its Ray and all its processes after a random number of parts, or while it starts, and run again by this
    process, in another Ray. The way to ask is drawn too."""
    how = moment.choice(("serve", "http", "embedded"))
    print(f"asked through {how}")
    path, output = write_rows(storage.parent / "in.jsonl", 120), storage.parent / "out"
    make: Callable[..., RunConfig] = lambda **changes: config_for(  # noqa: E731
        storage, tiny_base_dir, batch__input=str(path), batch__output=str(output), batch__max_new_tokens=150,
        batch__rows_per_file=4, batch__concurrency=4, **changes)
    with asked_through(how, make) as settings:
        command = [sys.executable, "-m", "jobs.batch", f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32",
                   "serve.model=plain", f"serve.port={free_port()}", f"batch.input={path}", f"batch.output={output}",
                   "batch.max_new_tokens=150", "batch.rows_per_file=4", "batch.concurrency=4", "serve.workers.threads=1",
                   *(f"{name.replace('__', '.')}={value}" for name, value in settings.items())]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | worker_env
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        wanted, deadline = moment.randrange(24), time.monotonic() + 600
        while len(list(output.glob("rows/part-*"))) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moment.uniform(0, 0.3) if wanted else moment.uniform(0, 12))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        finished = (output / "manifest.json").exists()
        before = {part.name: part.stat().st_mtime_ns for part in output.glob("rows/part-*")}
        result = run_batch(make(**settings))
    after = {part.name: part.stat().st_mtime_ns for part in output.glob("rows/part-*")}
    assert all(after[name] == stamp for name, stamp in before.items())  # nothing finished was made again
    assert result.skipped == finished
    if not finished:
        assert 4 * len(before) <= result.figures["resumed"] < 120  # an engine may still have written as it died
    check_answers(tiny_base, list(read_batch_rows(output / "rows", "jsonl")), 120, 150, 40)


def test_a_killed_job_leaves_no_application_for_good(local_ray: None, tiny_base_dir: Path, storage: Path,
                                                     worker_env: dict[str, str], moment: random.Random) -> None:
    """On a cluster that goes on: what the first run left ends within a minute by itself, and at once where the same work is run
    again; other work is not in its way."""
    path, output = write_rows(storage.parent / "in.jsonl", 80), storage.parent / "out"
    make: Callable[..., RunConfig] = lambda name, **changes: config_for(  # noqa: E731
        storage, tiny_base_dir, batch__input=str(path), batch__output=str(storage.parent / name), batch__max_new_tokens=150,
        batch__rows_per_file=4, batch__concurrency=2, serve__workers__cpus=0.1, **changes)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "jobs.batch", f"ray_address={address}", f"storage={storage}", f"base.model={tiny_base_dir}",
               "base.dtype=fp32", "serve.model=plain", f"batch.input={path}", f"batch.output={output}",
               "batch.max_new_tokens=150", "batch.rows_per_file=4", "batch.concurrency=2", "serve.workers.threads=1",
               "serve.workers.cpus=0.1"]
    process = subprocess.Popen(command, env={**os.environ, **worker_env}, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(output.glob("rows/part-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    (left,) = serve.status().applications
    assert left.startswith("hydra-heads-batch-")
    assert run_batch(make("beside", batch__limit=8)).figures["rows"] == 8
    deadline, alone = time.monotonic() + 60, moment.choice((True, False))
    while alone and serve.status().applications:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    result = run_batch(make("out"))
    assert result.figures["rows"] == 80 and 0 < result.figures["resumed"] < 80 and not serve.status().applications


def test_what_an_endpoint_cuts_off_is_an_error_row(local_ray: None, tiny_base_dir: Path, storage: Path) -> None:
    """A real one, with a limit that no answer meets: three attempts a row, and no wait as for a full queue."""
    app = start_app(config_for(storage, tiny_base_dir, serve__request_seconds=0.001))
    try:
        backend = open_backend(RequestSettings("hydra-heads", 200, 0.0, 0, address=app.url))
        asked: list[str] = []
        post = backend.client.post  # type: ignore[attr-defined]
        backend.client.post = lambda path, *more: (asked.append(path), post(path, *more))[1]  # type: ignore[attr-defined]
        reply = backend.ask(BatchRow("a", 1, prompt="question"))
        backend.stop()
    finally:
        app.stop()
    assert (reply.status, len(asked)) == (504, 3) and "within the 0.001 seconds" in reply.message
    assert "serve.request_seconds of the endpoint sets the limit" in reply.message


def test_an_embedded_engine_that_fails_is_made_again(tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    step, broken = Engine.step, set[str]()

    def failing(engine: Engine) -> list[StepOutput]:
        if bad := [row.request.id for row in engine.scheduler.decoding if "poison" in row.request.id]:
            broken.update(bad)
            raise RuntimeError("out of memory")
        return step(engine)

    monkeypatch.setattr(Engine, "step", failing)
    base = config_for(storage, tiny_base_dir).base.model_dump()
    app = AppArgs(base, str(storage / "cache"), None, "plain", max_batch_size=4, max_queued=8, threads=1)
    output, request_settings = Output(str(storage / "out"), "jsonl", "plain", 8), RequestSettings("m", 9, 0.0, 0, embedded=app)
    worker = BatchWorker(BatchSettings(output, request_settings, 8))
    worker.backend.retry_policy.pause = lambda _: None
    worker.answer(BatchRow("poison" if number == 5 else f"r{number}", number, prompt=f"question {number - 1}")
                  for number in range(1, 31))
    assert (worker.writer.done, worker.writer.failed) == (29, 1) and len(broken) == 3
    (error,) = read_batch_errors(storage / "out" / "errors", "jsonl")
    assert error["id"] == "poison" and "out of memory" in str(error["message"])
