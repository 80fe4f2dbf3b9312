"""Bad rows become error rows; only a bad file stops the job."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hydra_core.errors import InputError
from pipelines.prompt_files import PromptRow, RowError, read_dataset_rows, read_prompt_rows


def test_jsonl_rows_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [b'{"prompt": "one", "source": "s", "k": 1}', b'{"messages": [{"role": "user", "content": "hi"}]}',
             b'{"question_id": 7, "category": "qa", "turns": ["first", "second"]}', b'{"text": "no prompt"}', b"\xff\xfe",
             b"{broken", b'"text"', b'{"prompt": "  "}', b'{"messages": [{"role": "user"}]}', b"", b'{"turns": []}',
             b'{"prompt": "last"}']
    path.write_bytes(b"\n".join(lines))
    rows = list(read_prompt_rows(path))
    good = [row for row in rows if isinstance(row, PromptRow)]
    assert [row.prompt for row in good] == ["one", None, "first", "last"]
    assert good[0] == PromptRow(1, "one", None, "s", {"source": "s", "k": 1})
    assert good[1].messages == [{"role": "user", "content": "hi"}]
    assert good[2].extra == {"question_id": 7, "category": "qa"}
    messages = {row.row: row.message for row in rows if isinstance(row, RowError)}
    assert sorted(messages) == [4, 5, 6, 7, 8, 9, 10]
    assert all(f"row {number}" in message for number, message in messages.items())
    assert "UTF-8" in messages[5] and "`prompt`" in messages[4]


def test_limit_and_field(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"q": str(i)}) for i in range(9)), encoding="utf-8")
    assert [row.prompt for row in read_prompt_rows(path, "q", 4) if isinstance(row, PromptRow)] == list("0123")


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", None, "c"], "n": [1, 2, 3]}), tmp_path / "p.parquet")
    rows = list(read_prompt_rows(tmp_path / "p.parquet"))
    assert isinstance(rows[0], PromptRow) and rows[0].extra == {"n": 1}
    assert isinstance(rows[1], RowError) and len(list(read_prompt_rows(tmp_path))) == 3


@pytest.mark.parametrize(("name", "content", "word"), [
    ("empty.jsonl", b"", "empty"), ("blank.jsonl", b"\n\n", "empty"),
    ("nofield.jsonl", b'{"x": 1}\n{"y": 2}', "no field `prompt`"),
    ("broken.parquet", b"PAR1 not really", "Parquet"), ("binary.jsonl", b"\xff\xfe\n", "UTF-8")])
def test_files_that_are_wrong_as_a_whole(tmp_path: Path, name: str, content: bytes, word: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=word) as caught:
        list(read_prompt_rows(tmp_path / name))
    assert name in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(InputError, match="no such file"):
        list(read_prompt_rows("/nowhere.jsonl"))


def test_local_data_set(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": ["a", "b"]})}).save_to_disk(tmp_path / "d")
    rows = list(read_dataset_rows(str(tmp_path / "d"), "train"))
    assert [row.prompt for row in rows if isinstance(row, PromptRow)] == ["a", "b"]
    with pytest.raises(InputError, match="cannot be loaded"):
        list(read_dataset_rows(str(tmp_path / "d"), "nosplit"))
