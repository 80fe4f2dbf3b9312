"""A file far larger than the memory that it may take, through the whole job: 50,000 rows, each answered by a real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.batch.writer import BATCH, deduplicate

ROWS, WARM = 50_000, 5_000
CAP = 100 << 20
"""Bytes that the driver may grow by after the first answers, and the engine after the first tenth of the rows."""


def job(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Bytes that the driver and its engine hold of their own, by role; Ray's own processes are not counted."""
    found = {}
    for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        try:
            role = "driver" if one.pid == process.pid else "engine" if "MapWorker" in " ".join(one.cmdline()) else None
            if role:
                found[role] = one.memory_info().rss - one.memory_info().shared
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.drawn
def test_a_large_file_is_answered_under_a_cap(tiny_base_dir: Path, storage: Path, worker_env: dict[str, str]) -> None:
    path, output = storage.parent / "in.jsonl", storage.parent / "out"
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"prompt": f"q {number}", "note": f"{number:09d} " * 1000}) + "\n" for number in range(ROWS))
    command = [sys.executable, "-m", "jobs.batch", f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32",
               "base.context_limit=64", "serve.model=plain", "serve.max_batch_size=64", "serve.workers.threads=1",
               f"batch.input={path}", f"batch.output={output}",
               "batch.engine=embedded", "batch.max_new_tokens=1", "batch.rows_per_file=1000"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | worker_env
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    early: dict[str, int] = {}
    most: dict[str, int] = {}
    while process.poll() is None:
        parts = len(list(output.glob("rows/part-*")))
        begun = {"driver": parts > 0, "engine": parts * 1000 >= WARM}
        for role, size in job(process).items():
            if begun[role] or role in early:
                early.setdefault(role, size)
                most[role] = max(most.get(role, 0), size)
        time.sleep(0.1)
    assert process.stdout is not None
    result = json.loads(process.stdout.read())
    assert (result["rows"], result["errors"], result["rows_skipped"]) == (ROWS, 0, 0)
    assert len(deduplicate(output / "rows", "jsonl", BATCH).ids) == ROWS
    assert early.keys() == {"driver", "engine"} and path.stat().st_size > 4 * CAP
    grown = {role: most[role] - early[role] for role in early}
    assert max(grown.values()) < CAP, grown
