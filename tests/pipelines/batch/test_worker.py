"""Rows in flight: as many as asked for, no row lost when something breaks, nothing held but what is in flight."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from pipelines.batch import worker as batch_worker
from pipelines.batch.backend import RequestSettings, Response
from pipelines.batch.reader import BadRow, BatchRow, Reading, ordered
from pipelines.batch.retry import RetryPolicy
from pipelines.batch.worker import BatchSettings, BatchWorker
from pipelines.batch.writer import BATCH, Output, deduplicate, read_batch_rows


class Echo:
    """Answers each row with its prompt, and breaks at the row named `fault`."""

    def __init__(self, fault: str | None = None) -> None:
        self.retry_policy = RetryPolicy("echo")
        self.fault, self.running, self.most = fault, 0, 0
        self.lock = threading.Lock()

    made_by = "echo"

    def stop(self) -> None:
        self.retry_policy.stop()

    def ask(self, row: BatchRow) -> Response:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        if row.id == self.fault:
            raise RuntimeError("broken")
        with self.lock:
            self.running -= 1
        return Response(200, columns={"text": row.prompt, "token_ids": [5], "tokens": 1, "finish_reason": "stop", "steps": 0,
                                   "drafted": 0, "accepted": 0, "tokens_per_step": 0.0, "latency_seconds": 0.1})


def worker(monkeypatch: pytest.MonkeyPatch, folder: Path, backend: Echo, rows_per_file: int = 8) -> BatchWorker:
    monkeypatch.setattr(batch_worker, "open_backend", lambda _: backend)
    return BatchWorker(BatchSettings(Output(str(folder), "jsonl", "plain", rows_per_file), RequestSettings("m", 4, 0.0, 0), 3))


def test_rows_are_taken_only_as_others_are_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend, taken = Echo(), 0

    def rows() -> Iterator[BatchRow]:
        nonlocal taken
        for number in range(50):
            taken += 1
            assert taken - work.writer.done <= 6  # 3 asked, and one waiting behind each
            yield BatchRow(str(number), number, prompt="x")

    work = worker(monkeypatch, tmp_path, backend)
    work.answer(rows())
    assert backend.most <= 3 and work.writer.done == 50
    assert len({row["id"] for row in read_batch_rows(tmp_path / "rows", "jsonl")}) == 50


def test_what_was_answered_is_written_when_something_breaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = worker(monkeypatch, tmp_path, Echo(fault="20"))
    with pytest.raises(RuntimeError, match="broken"):
        work.answer(BatchRow(str(number), number, prompt="x") for number in range(50))
    found = deduplicate(tmp_path / "rows", "jsonl", BATCH)
    assert len(found.ids) == work.writer.done >= 14 and work.backend.retry_policy.stopped


def test_those_done_at_the_same_time_as_a_fault_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    work = worker(monkeypatch, tmp_path, Echo(fault="0"))
    monkeypatch.setattr(batch_worker, "wait", lambda flying, return_when: wait(flying))
    with pytest.raises(RuntimeError, match="broken"):
        work.answer(BatchRow(str(number), number, prompt="x") for number in range(3))
    assert work.writer.done == 2


def test_the_threads_that_a_stop_frees_begin_with_no_other_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows that wait behind those in flight would be sent to a backend that is stopped."""
    freed, asked = threading.Event(), list[str]()

    class Waiting(Echo):
        def ask(self, row: BatchRow) -> Response:
            asked.append(row.id)
            if row.id == "0":
                raise RuntimeError("broken")
            freed.wait(20)
            return super().ask(row)

        def stop(self) -> None:
            freed.set()
            threading.Event().wait(0.3)  # in which the threads that are free take what they find

    work = worker(monkeypatch, tmp_path, Waiting())
    with pytest.raises(RuntimeError, match="broken"):
        work.answer(BatchRow(str(number), number, prompt="x") for number in range(50))
    assert len(asked) <= 4  # three at once, and one in place of the row that broke


@pytest.mark.slow
def test_fifty_thousand_rows_of_a_large_file_pass_through_little_memory(monkeypatch: pytest.MonkeyPatch,
                                                                        tmp_path: Path) -> None:
    """200 MB of rows; what is held at most is a window, a part and 16 bytes an id."""
    work = worker(monkeypatch, tmp_path, Echo(), rows_per_file=64)
    monkeypatch.setattr(work.writer, "_write", lambda *_: [])  # the disk is no part of this

    def refuse(bad: BadRow) -> None:
        raise AssertionError(bad)

    reading = Reading(refuse)
    source = (BatchRow(str(number), number, prompt=f"{number:08d}" * 500) for number in range(50_000))
    tracemalloc.start()
    try:
        work.answer(ordered(reading.todo(source, set())))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (reading.rows, work.writer.done) == (50_000, 50_000)
    assert peak < 40 << 20
