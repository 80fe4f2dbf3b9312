"""Rows that stand twice: a killed job's workers went on writing, in blocks other than those of the job after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.config import load_config
from pipelines.distill import stage as distill
from pipelines.rows.parquet_parts import deduplicate, part_files, read_parts, write_part
from pipelines.rows.schemas import ERRORS, RESPONSES


def row(name: str) -> dict[str, str]:
    return {"id": name, "stage": "s", "message": f"of {name}"}


@pytest.mark.parametrize("parts", [
    ["ab", "bc"], ["ab", "b", "abc"], ["a", "ab", "b"], ["abc", "cba", "c", "d"], ["abcd", "cdef", "efab", "f"], ["a"], []])
def test_each_row_is_kept_once(tmp_path: Path, parts: list[str]) -> None:
    for part in parts:
        write_part(tmp_path, [row(name) for name in part], ERRORS)
    before = len(read_parts(tmp_path, ERRORS))
    names = sorted({name for part in parts for name in part})
    removed = deduplicate(tmp_path, ERRORS)
    found = sorted(read_parts(tmp_path, ERRORS).to_pylist(), key=lambda one: one["id"])
    assert found == [row(name) for name in names] and removed == before - len(names)
    files = part_files(tmp_path)
    assert deduplicate(tmp_path, ERRORS) == 0 and part_files(tmp_path) == files


def test_an_answer_in_two_parts_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no run of `distill` would ever end: its answers would be more than its prompts."""
    def answer(name: str) -> dict[str, Any]:
        return {"id": name, "prompt_id": name, "prompt_ids": [1], "response_ids": [2, 3], "finish_reason": "stop",
                "temperature": 0.0, "seed": 0, "source": "t", "split": "train", "base": "b"}

    for part in ("ab", "bc"):
        write_part(tmp_path / "responses", [answer(name) for name in part], RESPONSES)
    monkeypatch.setattr(distill, "_tasks", lambda *_: [answer(name) for name in "abc"])
    monkeypatch.setattr(distill, "_run", lambda *_: {})
    figures, _ = distill._responses(load_config(None, {"storage": str(tmp_path)}), tmp_path)
    assert (figures["responses"], figures["response_tokens"], figures["errors"]) == (3, 6, 0)
