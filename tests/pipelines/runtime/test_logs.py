"""Which lines of a cluster's processes a user sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.runtime.logs import _stderr_without, wanted_lines
from tests.conftest import ROOT

OURS = re.compile(r"((\x1b\[\d+m)?\([^ ]+ pid=\d+\)(\x1b\[0m)? )?(keys and values of |batch: |generate: |-- \d+ tokens)")
INFO = "INFO 2026-11-28 22:55:21,326 controller 8990 -- Deploying"
WARNING = "WARNING 2026-11-28 22:55:51,486 controller 8990 -- Slow answer."
STUCK = "WARNING 2026-11-28 22:55:51,486 controller 8990 -- 1 replicas have taken more than 30s to be scheduled."
BUSY = ("WARNING 2026-11-29 17:13:22,191 app_Ingress sk1zje1n -- Failed to get queue length from Replica(id='u72z0c9z', "
        "deployment='DecodeServer', app='app') within 0.1s. If this happens repeatedly")
FAILED = "Traceback (most recent call last):"
ERROR = "ERROR 2026-11-28 22:55:51,486 controller 8990 -- Failed to start replica."
RETRIED = ("Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so the task will be retried. "
           "Error: The actor is dead because it was killed by `ray.kill`.")


def shown(*lines: str, actor: str | None = None, pid: Any = 7) -> list[str]:
    return wanted_lines({"lines": list(lines), "pid": pid, "actor_name": actor, "is_err": True})


def test_serve_tells_of_errors_alone() -> None:
    assert shown(INFO, WARNING, "This may be caused by a slow __init__.", actor="ServeController") == []
    assert shown("and a line of the same record in the next batch", actor="ServeController") == []
    assert shown(ERROR, "Traceback", INFO, actor="ServeController") == [ERROR, "Traceback"]
    assert shown(INFO, ERROR, actor="ProxyActor", pid=8) == [ERROR]
    assert shown(INFO, STUCK, "It waits for CPU.", actor="ServeController") == [STUCK, "It waits for CPU."]
    assert shown(INFO, FAILED, "x", actor="ServeController") == [FAILED, "x"]
    assert shown(INFO, "keys and values", WARNING, BUSY, actor="ServeReplica:app:DecodeServer") == ["keys and values", WARNING]


def test_a_replica_that_dies_is_told_of_once() -> None:
    asked = "ERROR 2026-11-28 22:55:51,486 controller 8990 -- Exception when trying to get routing stats:"
    assert shown(asked, FAILED, "  File x", actor="ServeController", pid=9) == []
    assert shown("ray.exceptions.ActorDiedError", FAILED, "more", actor="ServeController", pid=9) == []  # the same record's
    assert shown(INFO, FAILED, "x", actor="ServeController", pid=9) == [FAILED, "x"]
    assert shown(asked, FAILED, ERROR, FAILED, actor="ServeController", pid=9) == [ERROR, FAILED]


def test_a_clean_shutdown_is_no_failure() -> None:
    assert shown(RETRIED, pid="raylet") == []
    other = RETRIED.replace("ServeController.graceful_shutdown", "measure")
    assert shown(other, pid="raylet") == [other]


def test_other_processes_are_not_filtered() -> None:
    assert shown(INFO, "bench: ngram", actor="MapWorker(MapBatches(BatchWorker))") == [INFO, "bench: ngram"]
    assert shown(INFO, "bench: ngram") == [INFO, "bench: ngram"]


def test_what_is_held_back_comes_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), _stderr_without("noise"):
        os.write(2, b"some noise\nours\n")
        assert capfd.readouterr().err == ""
        raise RuntimeError
    assert capfd.readouterr().err == "ours\n"


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["generate", "hello", "model=plain", "max_new_tokens=4"],
    ["batch", "batch.engine=embedded"],  # Ray and Ray Data, started and ended
    ["batch"],  # Ray and Serve
], ids=lambda words: "-".join(words[:2]))
def test_stderr_of_a_run_that_goes_well_holds_our_lines_alone(words: list[str], tiny_base_dir: Path, tmp_path: Path,
                                                              worker_env: dict[str, str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "say a"}\n', encoding="utf-8")
    settings = [f"storage={tmp_path}", f"base.model={tiny_base_dir}", "base.dtype=fp32"]
    if words[0] == "batch":
        settings += [f"batch.input={tmp_path / 'rows.jsonl'}", "batch.max_new_tokens=4", "serve.model=plain", "serve.port=0",
                     "serve.max_batch_size=2", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run([sys.executable, "-m", "jobs.cli", *words, *settings], cwd=ROOT, capture_output=True, text=True,
                          errors="replace", env=variables | worker_env, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if words[0] == "generate":
        assert lines[0].startswith("generate: ") and OURS.match(lines[-1]) and len(lines) <= 6, done.stderr  # and the answer
    else:
        # the cluster's own messages are of the machine: little memory, a full disk, a start that takes more than 30 s
        of_the_machine = re.compile(r"\(raylet\)|replicas that have taken more than \d+s|Use `ray status`|slow __init__")
        assert [line for line in lines if not OURS.match(line) and not of_the_machine.search(line)] == []
