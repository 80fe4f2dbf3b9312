"""What `batch` reads: three formats, every row counted, the order of asking."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydra_core.errors import InputError
from pipelines.batch.reader import (
    BadRow,
    BatchRow,
    Reading,
    digest,
    input_kind,
    ordered,
    output_kind,
    read_rows,
)
from pipelines.config import load_config, parse_override
from pipelines.rows.parquet_parts import write_part
from pipelines.rows.schemas import PROMPTS


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def request(name: object, url: str = "/v1/chat/completions", **changes: object) -> dict[str, object]:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"messages": []}} | changes


def test_formats_are_told_by_the_file_and_output_is_in_kind(tmp_path: Path) -> None:
    prompts, requests = write(tmp_path / "p.jsonl", {"prompt": "x"}), write(tmp_path / "r.jsonl", "{", request("a"))
    for path, wanted in ((prompts, "jsonl"), (requests, "openai"), (write(tmp_path / "p.parquet"), "parquet")):
        section = load_config(None, {"batch.input": str(path)}).batch
        assert input_kind(section) == output_kind(section) == wanted
    assert output_kind(load_config(None, {"batch.input": str(requests), "batch.format": "parquet"}).batch) == "parquet"
    assert output_kind(load_config().batch) == "parquet"
    with pytest.raises(InputError, match=r"p\.jsonl is not in that format"):
        output_kind(load_config(None, {"batch.input": str(prompts), "batch.format": "openai"}).batch)


def test_openai_rows_and_what_is_wrong_with_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", request("a"), request("b", "/v1/completions"), request("c", "/v1/embeddings"),
                 request("d", method="GET"), request(""), request("e", body=None), "[]", '{"custom_id"',
                 '{"custom_id": "f", "url": "/v1/completions", "body": {"prompt": "\\ud800"}}',
                 '{"custom_id": "\\ud800", "url": "/v1/completions", "body": {"prompt": "x"}}')
    rows = list(read_rows(load_config(None, {"batch.input": str(path)})))
    assert [row.id for row in rows] == ["a", "b", "c", "d", "row-5", "e", "row-7", "row-8", "f", "row-10"]
    assert [row.row for row in rows] == list(range(1, 11)) and all(digest(row.id) for row in rows)
    assert all(isinstance(row, BatchRow) for row in rows[:2]) and all(isinstance(row, BadRow) for row in rows[2:])
    words = ("url: is '/v1/embeddings'", "method: is 'GET'", "custom_id", "body", "not an object", "not JSON", "surrogate",
             "surrogate")
    for row, word in zip(rows[2:], words, strict=True):
        assert isinstance(row, BadRow) and word in row.message and f"row {row.row}" in row.message


def test_a_bad_first_line_does_not_decide_for_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"custom_id": "a"}, request("b"))
    rows = list(read_rows(load_config(None, {"batch.input": str(path), "batch.format": "openai"})))
    assert [type(row) for row in rows] == [BadRow, BatchRow]


def test_several_answers_need_a_format_that_holds_them(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", request("a", body={"messages": [], "n": 2}), request("b", body={"messages": [], "n": 1}))
    kept = list(read_rows(load_config(None, {"batch.input": str(path)})))
    assert all(isinstance(row, BatchRow) for row in kept)
    bad, good = read_rows(load_config(None, {"batch.input": str(path), "batch.format": "jsonl"}))
    assert isinstance(bad, BadRow) and "n: 2 answers need batch.format=openai" in bad.message and isinstance(good, BatchRow)


def test_an_id_of_nought_is_one(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "x", "id": 0}, {"prompt": "y", "id": "", "prompt_id": "p"})
    assert [row.id for row in read_rows(load_config(None, {"batch.input": str(path)}))] == ["0", "p"]


def test_every_row_is_counted_once() -> None:
    refused: list[BadRow] = []
    reading = Reading(refused.append)
    source = [BatchRow("a", 1), BadRow("row-2", 2, "bad"), BatchRow("b", 3), BatchRow("a", 4), BatchRow("c", 5),
              BadRow("row-2", 6, "bad again"), BadRow("a", 7, "bad, under the id of a good row"), BatchRow("row-2", 8),
              BatchRow("a", 9, prompt="another")]
    todo = list(reading.todo(source, {digest("b")}))
    assert [row.row for row in todo] == [1, 5, 8]  # a bad row's id takes no good row's place
    assert [bad.row for bad in refused] == [2, 6, 7, 9]
    assert "row 9: id 'a' belongs to row 1 already" in refused[-1].message
    assert (reading.rows, reading.skipped) == (9, 1)
    assert len(todo) + 1 + len(refused) + reading.skipped == reading.rows  # `b` was answered already


def test_shared_beginnings_come_together_and_lengths_fall() -> None:
    def chat(name: str, system: str, text: str) -> BatchRow:
        return BatchRow(name, 1, messages=[{"role": "system", "content": system}, {"role": "user", "content": text}])

    body = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "12"}]}
    rows = [chat("a", "S", "1"), BatchRow("p", 2, prompt="long" * 9), chat("b", "T", "1"), chat("c", "S", "123"),
            chat("d", "T", "12"), BatchRow("q", 3, prompt="short"), BatchRow("e", 4, url="/v1/chat/completions", body=body)]
    assert [row.id for row in ordered(rows)] == ["p", "q", "c", "e", "a", "d", "b"]
    assert [row.id for row in ordered([BatchRow("x", 1, url="u", body={"messages": [1]}), BatchRow("y", 1, url="u", body={})])]


def test_no_more_than_a_window_is_held() -> None:
    taken = 0

    def source() -> Iterator[BatchRow]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield BatchRow(str(number), number, prompt="x")

    rows = ordered(source(), window=10)
    assert taken == 0
    next(rows)
    assert taken == 10
    assert len({row.id for row in rows}) == 99


def test_partitions_and_their_words() -> None:
    day = dict([parse_override("batch.partition=2026-01-31")])
    section = load_config(None, {**day, "batch.input": "/in/{partition}.jsonl", "batch.output": "/out/{partition}"}).batch
    assert (section.source, section.target) == ("/in/2026-01-31.jsonl", "/out/2026-01-31")
    yesterday = load_config(None, {"batch.partition": "yesterday"}).batch.partition
    assert yesterday is not None and len(yesterday) == 10
    for values, word in (({"batch.output": "/out/{partition}"}, "needs batch.partition"),
                         ({**day, "batch.output": "/out"}, r"\{partition\} in it"),
                         ({"batch.partition": "../x"}, "partition"),
                         ({"batch.address": "http://h", "batch.engine": "embedded"}, "no effect")):
        with pytest.raises(InputError, match=word):
            load_config(None, values)


def test_without_an_input_the_prompts_of_the_run_are_asked(tmp_path: Path) -> None:
    """The held-out ones by id; the others follow them where more are asked for."""
    rows = [{"prompt_id": name, "messages": messages, "prompt": prompt, "prompt_ids": ids, "source": "x", "split": split}
            for name, messages, prompt, ids, split in [
                ("d", None, "four", [4], "held_out"), ("a", None, "one", [1], "train"), ("c", None, "three", [3], "train"),
                ("b", '[{"role": "user", "content": "zwei ü"}]', None, [2, 2], "held_out")]]
    write_part(tmp_path / "runs" / "r" / "distill" / "prompts", rows[:3], PROMPTS, key="prompt_id")
    write_part(tmp_path / "runs" / "r" / "distill" / "prompts", rows[3:], PROMPTS, key="prompt_id")
    config = {"storage": str(tmp_path), "name": "r"}
    held_out = [BatchRow("b", 1, None, [{"role": "user", "content": "zwei ü"}], [2, 2]), BatchRow("d", 2, "four", None, [4])]
    others = [BatchRow("a", 3, "one", None, [1]), BatchRow("c", 4, "three", None, [3])]
    assert list(read_rows(load_config(None, config))) == held_out
    for limit in (1, 2, 3, 4, 9):
        assert list(read_rows(load_config(None, config | {"batch.limit": limit}))) == (held_out + others)[:limit]
