"""The writer of `batch` by itself: what it asks for and what it writes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray import serve

from pipelines.batch import BATCH_INPUT
from pipelines.batch_worker import BatchSettings, BatchWriter, read_batch_rows
from pipelines.serving.records import Answer, Generation, Refusal


class Handle:
    """Answers each request with `text`, and the first one of all with a full queue."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked: list[Generation] = []
        self.generate = SimpleNamespace(remote=self._remote)

    def _remote(self, generation: Generation) -> Any:
        self.asked.append(generation)
        if len(self.asked) == 1:
            return SimpleNamespace(result=lambda: Refusal(429, "full"))
        answer = Answer(generation.id, self.text, (5, 6), "stop", 3, 1, 1, 1, 0.1)
        return SimpleNamespace(result=lambda: answer)


def writer(folder: Path, kind: str = "jsonl") -> BatchWriter:
    return BatchWriter(BatchSettings(str(folder), "app", "plain", kind, 8, 0.0, 0, 2, 2))


def block(*ids: str) -> pa.Table:
    rows = [{"id": row_id, "row": number, "prompt": "x", "messages": None, "prompt_ids": None}
            for number, row_id in enumerate(ids, start=1)]
    return pa.Table.from_pylist(rows, schema=BATCH_INPUT)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_line_ends_of_every_kind_are_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    text = "one\u2028two\u2029three\u0085four\rfive\nsix\x0b\x0c\x1c"
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *_: Handle(text))
    writer(tmp_path, kind)(block("a", "b", "c"))
    assert sorted((row["id"], row["text"]) for row in read_batch_rows(tmp_path / "rows", kind)) == [
        (row_id, text) for row_id in "abc"]


def test_each_attempt_asks_under_an_id_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handle = Handle("x")
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *_: handle)
    writer(tmp_path)(block("a", "b"))
    writer(tmp_path)(block("a", "b"))  # another job, or this one again: the application may still have the first
    assert len(handle.asked) == 5  # one of them found the queue full
    assert len({generation.id for generation in handle.asked}) == 4
    assert all(generation.id.startswith("batch-") for generation in handle.asked)
