"""A user's file in pieces: what is read of it, what repeats, and what becomes of each row; without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hydra_core.errors import InputError
from pipelines.config import PromptsSection, RunConfig, load_config
from pipelines.distill import file_prompts, prompts
from pipelines.distill.file_prompts import SOURCE, PromptReader
from pipelines.distill.prompts import check_prompts, read_prompts, written_prompts
from pipelines.distill.tasks import PartWriter
from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.schemas import ERRORS, PROMPTS
from pipelines.runtime.row_flow import Rows
from tests.pipelines.distill import stand_ins
from tests.pipelines.distill.test_stage import in_this_process
from tests.tiny import make_tokenizer

LINES = ['{"prompt": "a"}', "{", '{"prompt": "b", "source": "mine"}', '{"prompt": "a"}',
         '{"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}', '{"x": 1}',
         '{"messages": [{"role": "user", "content": "c"}]}', '{"prompt": "e"}', '{"prompt": "b"}']
REJECTED = '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, {"role": "user", "content": "q"}]}'


def file_of(folder: Path, *lines: str) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_rows_are_the_same_however_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The first of equal rows stays; a row that the template rejects is an error each time that it occurs."""
    path = file_of(tmp_path, *LINES, REJECTED, REJECTED)
    monkeypatch.setattr(file_prompts, "PART_ROWS", size)
    rows, errors, counts = stand_ins.file_prompts(path, make_tokenizer())
    assert [row["prompt"] for row in rows] == ["a", "b", None, "e"]
    assert [row["source"] for row in rows] == ["p.jsonl", "mine", "p.jsonl", "p.jsonl"]
    assert json.loads(rows[2]["messages"]) == [{"role": "user", "content": "c"}] and rows[2]["prompt_ids"]
    assert [(row["id"], row["message"].split(":")[0]) for row in errors] == [
        (f"{path}:{number}", f"row {number}") for number in (2, 6, 10, 11)]
    assert "does not render tool calls" in errors[2]["message"] and counts == {"read": 11, "skipped": 3}


def test_a_file_that_is_read_again_gives_the_same_pieces(tmp_path: Path) -> None:
    """So a task that dies in the middle is repeated without loss."""
    section = PromptsSection(source="jsonl", path=str(file_of(tmp_path, *LINES)))
    once, again = ([(rows.table.to_pylist(), rows.counts) for rows in PromptReader(section)(SOURCE[0])] for _ in range(2))
    assert once == again


def settings(storage: Path, base: Path, path: Path, **changes: Any) -> tuple[RunConfig, Path]:
    config = load_config(None, {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "prompts.source": "jsonl",
                                "prompts.path": str(path), **{key.replace("__", "."): value for key, value in changes.items()}})
    return config, storage / "runs" / "default" / "distill"


def test_prompts_appear_whole_or_not_at_all(tiny_base_dir: Path, storage: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many bad rows and a write that fails leave nothing; the first bad row is named."""
    monkeypatch.setattr(prompts, "run_flow", in_this_process)
    monkeypatch.setattr(file_prompts, "PART_ROWS", 2)
    config, folder = settings(storage, tiny_base_dir, file_of(tmp_path, *LINES))
    with pytest.raises(InputError, match=r"2 of 9 rows failed.*row 2: is not JSON.*; mend the file"):
        read_prompts(config, folder)
    assert not (folder / "prompts").exists() and not (folder / "errors" / "prompts").exists()
    allowed, _ = settings(storage, tiny_base_dir, file_of(tmp_path, *LINES), distill__max_error_share=0.5)
    with monkeypatch.context() as patch:
        def failing(writer: PartWriter, rows: Rows) -> None:
            if rows.name == "errors/prompts":
                raise RuntimeError("cannot be written")
            write(writer, rows)

        write = PartWriter.__call__
        patch.setattr(PartWriter, "__call__", failing)
        with pytest.raises(RuntimeError, match="cannot be written"):
            read_prompts(allowed, folder)
    assert not (folder / "prompts").exists()
    read_prompts(allowed, folder)
    assert written_prompts(folder) == {"prompts": 4, "prompt_errors": 2, "prompts_skipped": 3, "self_made": 0}
    assert len(read_parts(folder / "prompts", PROMPTS)) == 4 and len(read_parts(folder / "errors" / "prompts", ERRORS)) == 2
    monkeypatch.setattr(prompts, "run_flow", lambda *_, **__: pytest.fail("they are written already"))
    read_prompts(allowed, folder)


def test_a_file_without_a_usable_row(tiny_base_dir: Path, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ray is started where no row is a prompt; after it where the template rejects all of them."""
    monkeypatch.setattr(prompts, "run_flow", in_this_process)
    config, folder = settings(storage, tiny_base_dir, file_of(tmp_path, '{"x": 1}'))
    with pytest.raises(InputError, match="none of its 1 rows is usable; row 1: has no field `prompt`"):
        check_prompts(config, folder)
    config, folder = settings(storage, tiny_base_dir, file_of(tmp_path, REJECTED))
    check_prompts(config, folder)
    with pytest.raises(InputError, match=r"p\.jsonl: has no usable prompt: row 1: messages\[0\]\.tool_calls"):
        read_prompts(config, folder)
