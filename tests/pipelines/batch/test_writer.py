"""What `batch` writes: in kind, read back as it was, each row in one place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.batch.backend import Response
from pipelines.batch.reader import BadRow, BatchRow, digest
from pipelines.batch.report import report
from pipelines.batch.writer import BATCH, BATCH_ERRORS, Output, OutputTotals, Writer, deduplicate, parts, read_batch_rows

BODY: dict[str, Any] = {"usage": {"completion_tokens": 3, "speculative": {"steps": 1, "drafted": 4, "accepted": 1}}}


def reply(text: str = "x") -> Response:
    return Response(200, columns={"text": text, "token_ids": [5, 6, 7], "tokens": 3, "finish_reason": "stop", "steps": 1,
                               "drafted": 4, "accepted": 1, "tokens_per_step": 2.0, "latency_seconds": 0.5}, body=BODY)


def written(folder: Path, kind: str, *ids: str, rows_per_file: int = 2, text: str = "x") -> Output:
    output = Output(str(folder), kind, "plain", rows_per_file)
    writer = Writer(output)
    for number, name in enumerate(ids):
        writer.add(BatchRow(name, number), reply(text))
    writer.flush()
    return output


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_line_ends_of_every_kind_are_read_back(tmp_path: Path, kind: str) -> None:
    text = "one\u2028two\u2029three\u0085four\rfive\nsix\x0b\x0c\x1c"
    output = written(tmp_path, kind, "a", "b", "c", text=text)
    assert len(parts(output.rows, kind)) == 2
    assert sorted((row["id"], row["text"]) for row in read_batch_rows(output.rows, kind)) == [(name, text) for name in "abc"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "openai"])
def test_rows_written_twice_are_left_in_one_place(tmp_path: Path, kind: str) -> None:
    output = written(tmp_path, kind, "a", "b", "c", "d")
    written(tmp_path, kind, "b", "c", "e")  # other parts, of a job that was killed or a block begun again
    written(tmp_path, kind, "a", rows_per_file=1)
    found = deduplicate(output.rows, kind, BATCH)
    names = [str(row.get("custom_id", row.get("id"))) for row in read_batch_rows(output.rows, kind)]
    assert sorted(names) == list("abcde") and found.ids == {digest(name) for name in "abcde"}
    assert (found.tokens, found.steps, found.drafted, found.accepted) == (15, 5, 20, 5)
    again = deduplicate(output.rows, kind, BATCH)
    assert again.ids == found.ids and not deduplicate(output.rows, kind, BATCH, elsewhere=found.ids).ids
    assert not parts(output.rows, kind)


def test_a_part_that_takes_another_ones_name_is_kept(tmp_path: Path) -> None:
    """Killed while it settled: {a, b}, {b, c} and the {c} that was to replace it. Names come from the rows, so ids are sought
    that sort the part to be rewritten before the one whose name it then takes."""
    for number in range(200):
        a, b, c = (f"{name}{number}" for name in "abc")
        shutil.rmtree(tmp_path / "rows", ignore_errors=True)
        for ids in ((a, b), (b, c), (c,)):
            output = written(tmp_path, "jsonl", *ids)
        names = [sorted(json.loads(line)["id"] for line in path.open()) for path in parts(output.rows, "jsonl")]
        if names == [[a, b], [b, c], [c]]:
            break
    else:
        raise AssertionError("no such names")
    found = deduplicate(output.rows, "jsonl", BATCH)
    stand = [row["id"] for row in read_batch_rows(output.rows, "jsonl")]
    assert sorted(stand) == [a, b, c] and found.ids == {digest(name) for name in (a, b, c)}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "openai"])
def test_errors_by_kind(tmp_path: Path, kind: str) -> None:
    writer = Writer(Output(str(tmp_path), kind, "plain", 2))
    writer.refuse(BadRow("row-1", 1, "row 1: is not JSON"))
    error = {"error": {"message": "too long"}}
    writer.add(BatchRow("a", 2), Response(400, "too long", body=error))
    writer.add(BatchRow("b", 3), Response(500, "failed"))
    writer.add(BatchRow("c", 4), reply())
    writer.flush()
    found = deduplicate(writer.output.errors, kind, BATCH_ERRORS)
    assert found.kinds == {"input": 1, "refused": 1, "failed": 1} and len(parts(writer.output.rows, kind)) == 1
    rows = deduplicate(writer.output.rows, kind, BATCH)
    figures = report(rows, found, OutputTotals(), 0, 2.0, "plain")
    assert (figures["errors"], figures["errors_refused"], figures["tokens"]) == (3, 1, 3)
    assert (figures["acceptance"], figures["tokens_per_step"], figures["tokens_per_second"]) == (0.25, 2.0, 1.5)


def test_openai_lines_have_its_shape(tmp_path: Path) -> None:
    writer = Writer(Output(str(tmp_path), "openai", "plain", 9))
    writer.add(BatchRow("a", 1), reply())
    writer.add(BatchRow("b", 2), Response(400, "too long", body={"error": {"message": "too long"}}))
    writer.refuse(BadRow("row-3", 3, "row 3: is not JSON"))
    writer.flush()
    (good,) = [json.loads(line) for path in parts(tmp_path / "rows", "openai") for line in path.open()]
    bad = [json.loads(line) for path in parts(tmp_path / "errors", "openai") for line in path.open()]
    for line in (good, *bad):
        assert set(line) == {"id", "custom_id", "response", "error"} and line["id"].startswith("batch_req_")
    assert good["custom_id"] == "a" and good["error"] is None
    assert good["response"]["status_code"] == 200 and good["response"]["body"] == BODY and good["response"]["request_id"]
    assert [(line["custom_id"], line["error"]["code"]) for line in bad] == [("b", "status_400"), ("row-3", "invalid_row")]
    assert bad[0]["response"]["status_code"] == 400 and bad[1]["response"] is None


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "openai"])
def test_bad_rows_take_nobodys_place(tmp_path: Path, kind: str) -> None:
    """Two bad rows under one id, that of a good row too: all three are kept, and again after another read."""
    writer = Writer(Output(str(tmp_path), kind, "m", 64))
    writer.add(BatchRow("row-1", 2), reply())
    for number in (1, 3):
        writer.refuse(BadRow("row-1", number, f"row {number}: is not JSON"))
    writer.flush()
    for _ in range(2):
        rows = deduplicate(writer.output.rows, kind, BATCH)
        errors = deduplicate(writer.output.errors, kind, BATCH_ERRORS, elsewhere=rows.ids)
        assert (len(rows.ids), len(errors.ids), errors.kinds["input"]) == (1, 2, 2)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "openai"])
def test_error_parts_of_one_id_do_not_replace_each_other(tmp_path: Path, kind: str) -> None:
    """A row that failed, and a bad row under its id, each alone in a part: parts are named after their rows."""
    writer = Writer(Output(str(tmp_path), kind, "m", 1))
    writer.add(BatchRow("row-4", 4), Response(500, "broken"))
    for number in (16, 17):
        writer.refuse(BadRow("row-4", number, f"row {number}: id 'row-4' belongs to row 4 already"))
    found = deduplicate(writer.output.errors, kind, BATCH_ERRORS)
    assert len(parts(writer.output.errors, kind)) == len(found.ids) == 3 and found.kinds == {"failed": 1, "input": 2}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_torn_part_is_set_aside(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a power cut leaves one: its rows count as not answered, and are asked for again."""
    writer = Writer(Output(str(tmp_path), kind, "m", 1))
    for name in ("a", "b"):
        writer.add(BatchRow(name, 1), reply("text of some length"))
    torn = parts(writer.output.rows, kind)[0]
    torn.write_bytes(torn.read_bytes()[:-9])
    assert len(deduplicate(writer.output.rows, kind, BATCH).ids) == 1 == len(parts(writer.output.rows, kind))
    assert f"{torn} cannot be read" in capsys.readouterr().err
    assert torn.with_name(f".{torn.name}.torn").exists()
