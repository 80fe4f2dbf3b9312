"""Bad rows become error rows; only a bad file stops the job."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hydra_core.errors import InputError
from pipelines.config import PromptsSection
from pipelines.distill.prompts import source_digest
from pipelines.rows.prompt_reader import PromptRow, RowError, read_dataset_rows, read_prompt_rows
from tests.pipelines.distill.stand_ins import file_prompts
from tests.tiny import make_tokenizer


def test_jsonl_rows_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [b'{"prompt": "one", "source": "s", "k": 1}', b'{"messages": [{"role": "user", "content": "hi"}]}',
             b'{"question_id": 7, "category": "qa", "turns": ["first", "second"]}', b'{"text": "no prompt"}', b"\xff\xfe",
             b"{broken", b'"text"', b'{"prompt": "  "}', b'{"messages": [{"role": "user"}]}', b"", b'{"turns": []}',
             b'{"prompt": "last"}', b'{"turns": ["first", 2]}']
    path.write_bytes(b"\n".join(lines))
    rows = list(read_prompt_rows(path))
    good = [row for row in rows if isinstance(row, PromptRow)]
    assert [row.prompt for row in good] == ["one", None, "first", "last"]
    assert good[0] == PromptRow(1, "one", None, "s", {"source": "s", "k": 1})
    assert good[1].messages == [{"role": "user", "content": "hi"}]
    assert good[2].extra == {"question_id": 7, "category": "qa"} and good[2].turns == ("first", "second")
    messages = {row.row: row.message for row in rows if isinstance(row, RowError)}
    assert sorted(messages) == [4, 5, 6, 7, 8, 9, 11, 13]  # line numbers: the tenth is blank
    assert "turns: number 1 is not text" in messages[11] and "turns: number 2 is not text" in messages[13]
    assert good[3].row == 12
    assert all(f"row {number}" in message for number, message in messages.items())
    assert "UTF-8" in messages[5] and "`prompt`" in messages[4]


@pytest.mark.parametrize(("line", "column"), [
    (r'{"prompt": "half \ud800"}', "prompt"), (r'{"messages": [{"role": "user", "content": "\udfff"}]}', "messages"),
    (r'{"prompt": "x", "id": "\ud83d"}', "id"), (r'{"prompt": "x", "\ud83d": 1}', r"\ud83d")])
def test_half_a_character_is_a_bad_row(tmp_path: Path, line: str, column: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + '\n{"prompt": "\\ud83d\\ude00"}\n', encoding="utf-8")
    bad, good = read_prompt_rows(path)
    assert isinstance(bad, RowError) and bad.message.startswith(f"row 1: {column}: holds half a character")
    assert isinstance(good, PromptRow) and good.prompt == "\U0001f600"
    rows, errors, counts = file_prompts(path, make_tokenizer())
    assert (len(rows), len(errors), counts) == (1, 1, {"read": 2, "skipped": 0})


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "9" * 5000 + "}"])
def test_what_the_json_parser_chokes_on_is_a_bad_row(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line + '\n{"prompt": "x"}\n', encoding="utf-8")
    bad, good = read_prompt_rows(path)
    assert isinstance(bad, RowError) and "row 1: is not JSON" in bad.message and isinstance(good, PromptRow)


def test_limit_and_field(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"q": str(i)}) for i in range(9)), encoding="utf-8")
    assert [row.prompt for row in read_prompt_rows(path, "q", 4) if isinstance(row, PromptRow)] == list("0123")


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", None, "c"], "n": [1, 2, 3]}), tmp_path / "p.parquet")
    rows = list(read_prompt_rows(tmp_path / "p.parquet"))
    assert isinstance(rows[0], PromptRow) and rows[0].extra == {"n": 1}
    assert isinstance(rows[1], RowError) and len(list(read_prompt_rows(tmp_path))) == 3
    (tmp_path / "p.parquet").rename(tmp_path / "p.pq")
    assert [row.row for row in read_prompt_rows(tmp_path / "p.pq")] == [1, 2, 3]
    assert len(list(read_prompt_rows(tmp_path))) == 3


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary())
    pq.write_table(pa.table({"prompt": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}), tmp_path / "p.parquet")
    one, two, three = read_prompt_rows(tmp_path / "p.parquet")
    assert isinstance(one, PromptRow) and isinstance(three, PromptRow) and three.row == 3
    assert two == RowError(2, "row 2: is not UTF-8 text")


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


def test_the_source_counts_by_its_bytes(tmp_path: Path) -> None:
    import datasets

    def digest(source: str, path: Path | str) -> str | None:
        return source_digest(PromptsSection(source=source, path=str(path)))  # type: ignore[arg-type]

    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}', encoding="utf-8")
    first = digest("jsonl", path)
    path.write_text('{"prompt": "b"}', encoding="utf-8")
    assert first != digest("jsonl", path)
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(tmp_path / "d")
    first = digest("datasets", tmp_path / "d")
    datasets.Dataset.from_dict({"prompt": ["b"]}).save_to_disk(tmp_path / "e")
    assert first and first != digest("datasets", tmp_path / "e")
    assert digest("datasets", "someone/prompts") is None and source_digest(PromptsSection()) is None
    with pytest.raises(InputError, match=r"prompts\.path=/nowhere: no such file"):
        digest("parquet", "/nowhere")
