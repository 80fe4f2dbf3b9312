"""Rows that stand twice: a killed job's workers went on writing, in blocks other than those of the job after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.rows.parquet_parts import deduplicate, part_files, read_parts, write_part
from pipelines.rows.schemas import ERRORS


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
