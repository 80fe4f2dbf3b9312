"""A file far larger than the memory it may take, answered by a real engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import psutil
import pytest

from pipelines.batch_ask import Asking
from pipelines.batch_files import BATCH, Output, settle
from pipelines.batch_rows import BadRow, Reading, ordered, read_rows
from pipelines.batch_worker import BatchSettings, BatchWorker
from pipelines.config import load_config
from pipelines.serving.records import AppArgs

ROWS, WARM = 6_000, 300
CAP = 80 << 20  # bytes more than after the first rows


def refuse(bad: BadRow) -> None:
    raise AssertionError(bad)


@pytest.mark.slow
def test_a_large_file_is_answered_under_a_cap(tiny_base_dir: Path, tmp_path: Path) -> None:
    """300 MB of rows with short prompts through the tiny base: the process grows by a quarter of that at most.

    Fewer rows than the 50,000 that pass the writer in `test_batch_worker`: here each takes an engine's step or two.
    """
    path = tmp_path / "in.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"prompt": f"q {number}", "note": f"{number:010d}" * 5000}) + "\n" for number in range(ROWS))
    base = {"model": str(tiny_base_dir), "dtype": "fp32", "device": "cpu", "context_limit": None}
    app = AppArgs(base, str(tmp_path / "cache"), None, "plain", max_batch=32, max_queued=64, threads=1)
    worker = BatchWorker(BatchSettings(Output(str(tmp_path / "out"), "jsonl", "plain", 64),
                                       Asking("m", 2, 0.0, 0, embedded=app), 48))
    known: set[bytes] = set()
    warm = load_config(None, {"batch.input": str(path), "batch.limit": WARM})
    worker.answer(ordered(Reading(refuse).todo(read_rows(warm), known)))
    process, most, stop = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.05):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    reading = Reading(refuse)
    try:
        known = settle(tmp_path / "out" / "rows", "jsonl", BATCH).ids
        worker.answer(ordered(reading.todo(read_rows(load_config(None, {"batch.input": str(path)})), known)))
    finally:
        stop.set()
        watcher.join()
    assert reading.rows == ROWS == len(settle(tmp_path / "out" / "rows", "jsonl", BATCH).ids)
    assert path.stat().st_size > 3.5 * CAP and 0 < most[0] - before < CAP, most[0] - before
