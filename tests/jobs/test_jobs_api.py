"""Stages as people submit them: the Jobs API of a default two-CPU head node, with the runtime environment we ship."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.schemas import FEATURES
from tests.conftest import ROOT
from tests.pipelines.serve.test_stage import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
START_SECONDS, JOB_SECONDS, STOP_SECONDS = 300, 900, 60
RUNTIME_ENV = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def client() -> Iterator[JobSubmissionClient]:
    """A head node of our own: free ports, its own folder, ended by ending the very process that holds it."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: the path of a socket has room for 107 characters
    port = free_port()
    scripts = str(Path(sys.executable).parent)
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    environment["PATH"] = f"{scripts}{os.pathsep}{environment['PATH']}"  # a job says `python`
    environment["RAY_AUTH_MODE"] = "disabled"  # else it depends on whether this user's home holds a token
    log = (folder / "head.log").open("wb")
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}",
         f"--port={free_port()}", f"--dashboard-port={port}", f"--ray-client-server-port={free_port()}",
         f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"],
        env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield connect(f"http://127.0.0.1:{port}", head, folder / "head.log")
    finally:
        head.terminate()
        try:
            head.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def connect(address: str, head: subprocess.Popen[bytes], log: Path) -> JobSubmissionClient:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and head.poll() is None:
        try:
            found = JobSubmissionClient(address)
            found.list_jobs()
            return found
        except (ConnectionError, RuntimeError):
            time.sleep(1)
    pytest.fail(f"no head node: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def submit(client: JobSubmissionClient, command: str) -> tuple[JobStatus, str]:
    """Run `command` as a job; its last status and its log."""
    job = client.submit_job(entrypoint=command, runtime_env={**RUNTIME_ENV, "working_dir": str(ROOT)})
    deadline = time.monotonic() + JOB_SECONDS
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < deadline:
        time.sleep(1)
    return status, client.get_job_logs(job)


def result_of(client: JobSubmissionClient, command: str) -> dict[str, Any]:
    """The one JSON line of a job that must succeed."""
    status, log = submit(client, command)
    assert status == JobStatus.SUCCEEDED, log[-4000:]
    lines = [line for line in log.splitlines() if line.startswith("{")]
    assert len(lines) == 1, log[-4000:]
    return json.loads(lines[0])


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(count)), encoding="utf-8")
    return path


def test_distill_train_and_batch_as_submitted_jobs(client: JobSubmissionClient, tiny_base_dir: Path,
                                                   tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    chain = f"name=submitted storage={storage} base.model={tiny_base_dir} base.dtype=fp32"
    prompts = write_rows(tmp_path / "prompts.jsonl", 16)

    distilled = result_of(client, f"python -m jobs.distill {chain} prompts.source=jsonl prompts.path={prompts} "
                                  "distill.max_new_tokens=12 distill.held_out=0.4 distill.workers.threads=1")
    folder = storage / "runs" / "submitted"
    rows = read_parts(folder / "distill" / "features", FEATURES)
    assert distilled["stage"] == "distill" and rows.num_rows == 32 == distilled["responses"]
    assert json.loads((folder / "distill" / "provenance.json").read_text(encoding="utf-8"))["git"] is None

    trained = result_of(client, f"python -m jobs.train {chain} train.only=hydra train.max_steps=2 train.rows_per_step=4 "
                                "train.validate_every=2 train.validation_rows=4")
    assert trained["stage"] == "train"
    assert list((folder / "train" / "hydra").rglob("model.safetensors"))

    answered = result_of(client, f"python -m jobs.batch {chain} serve.model=plain serve.port={free_port()} "
                                 f"serve.workers.threads=1 batch.input={prompts} batch.output={tmp_path / 'answers'} "
                                 "batch.max_new_tokens=4")
    assert answered["rows"] == 16 and answered["errors"] == 0
    assert Path(answered["outputs"]["rows"]).is_relative_to(tmp_path / "answers")


def test_a_relative_path_in_a_submitted_job_is_a_mistake(client: JobSubmissionClient, tmp_path: Path) -> None:
    status, log = submit(client, f"python -m jobs.batch storage={tmp_path} serve.model=plain batch.input=prompts.jsonl")
    assert status == JobStatus.FAILED
    assert "error: batch.input=prompts.jsonl: is a relative path" in log and "Traceback" not in log
    assert not list(tmp_path.iterdir())
