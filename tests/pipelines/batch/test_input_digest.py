"""The input is hashed as it is read: rows of another one end the job, and are never taken for its own."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hydra_core.errors import InputError
from pipelines.batch import input_digest as digests
from pipelines.batch import stage as batch_stage
from pipelines.batch.input_digest import InputChanged, input_digest, unchanged_rows
from pipelines.batch.reader import ordered
from pipelines.batch.stage import run_batch
from pipelines.batch.writer import read_batch_rows
from pipelines.config import RunConfig, load_config
from tests.pipelines.batch.stand_in import StandIn

ROWS = 30
LONG = "x" * 100_000
"""Of which the reader holds ten rows at a time."""


def lines(count: int = ROWS) -> bytes:
    return "".join(json.dumps({"prompt": f"question {number} {LONG}"}) + "\n" for number in range(count)).encode()


@pytest.fixture
def make(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(batch_stage, "ordered", lambda rows: ordered(rows, 2))

    def config(address: str = "http://h", name: str = "in.jsonl", **changes: Any) -> RunConfig:
        values = {"storage": str(storage), "batch.input": str(tmp_path / name), "batch.output": str(tmp_path / "out"),
                  "batch.address": address, "batch.rows_per_file": 2, "batch.concurrency": 1}
        return load_config(None, values | {name.replace("__", "."): value for name, value in changes.items()})

    return config


def texts(folder: Path) -> list[str]:
    return [row["text"] for row in sorted(read_batch_rows(folder / "rows", "jsonl"), key=lambda row: row["row"])]


def test_an_input_that_changes_in_the_middle_ends_the_job(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """And its output is not gone on with, though the first input is back: some of its rows answer others."""
    path, before = tmp_path / "in.jsonl", lines()
    path.write_bytes(before)

    def instead(number: int, body: dict[str, Any]) -> None:
        if number == 3:
            with path.open("r+b") as file:
                file.seek(-100, os.SEEK_END)
                file.write(b"y" * 90)

    with StandIn() as server:
        server.instead = instead  # type: ignore[assignment]
        with pytest.raises(InputError, match=r"in\.jsonl: changed while it was read: its rows and earlier ones are mixed in "):
            run_batch(make(server.address))
        assert texts(tmp_path / "out") and not (tmp_path / "out" / "manifest.json").exists()
        path.write_bytes(before)
        with pytest.raises(InputError, match="holds rows of an input that changed while it was read: delete that folder"):
            run_batch(make(server.address))


def test_an_input_that_is_replaced_in_the_middle_is_read_to_its_end(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The rows are those of the file that was opened, as every byte of it says."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines())

    def instead(number: int, body: dict[str, Any]) -> None:
        if number == 3:
            (tmp_path / "new").write_bytes(lines(50).replace(b"question", b"other"))
            (tmp_path / "new").replace(path)

    with StandIn() as server:
        server.instead = instead  # type: ignore[assignment]
        assert run_batch(make(server.address)).figures["rows"] == ROWS
    assert [text.split()[2] for text in texts(tmp_path / "out")] == [str(number) for number in range(ROWS)]


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("name", ["in.jsonl", "in.json", "in.csv", "in.jsonl.gz", "in.jsonl.bz2", "in.jsonl.xz", "in.jsonl.zst",
                                  "utf16.jsonl", "in.parquet", "folder"])
def test_what_was_read_is_the_file(make: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   name: str, limit: int | None) -> None:
    """In every format, to a limit too; a change is seen by what was read, or by what was not."""
    path, raw = tmp_path / name, b"".join(json.dumps({"prompt": f"p{n}"}).encode() + b"\n" for n in range(9))
    if name == "folder":
        path.mkdir()
        path = path / "part.parquet"
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"prompt": ["a", "b"]}), path)
    else:
        pack: dict[str, Callable[[bytes], bytes]] = {
            ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".csv": lambda _: b"prompt\na\nb\n",
            ".zst": lambda raw: bytes(pa.Codec("zstd").compress(raw)), ".json": lambda _: b'[{"prompt": "a"}, {"prompt": "b"}]'}
        raw = raw.decode().encode("utf-16") if name.startswith("utf16") else raw
        path.write_bytes(pack.get(path.suffix, bytes)(raw))
    config = make(name=name, batch__limit=limit)
    wanted = input_digest(config)
    rows = list(batch_stage.read_rows(config))
    if path.suffix != ".parquet":
        monkeypatch.setattr(digests.artifacts, "file_digest", None)  # nobody reads it once more for that
    assert list(unchanged_rows(config, wanted)) == rows and len(rows) == (limit or len(rows)) > 0
    with pytest.raises(InputChanged, match="changed while it was read"):
        list(unchanged_rows(config, "another"))


def test_an_input_that_has_gone_or_cannot_be_read_any_more_has_changed(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines())
    rows = unchanged_rows(config := make(batch__limit=1), input_digest(config))
    next(rows)
    path.unlink()
    with pytest.raises(InputChanged):
        list(rows)
    path.write_bytes(os.urandom(3 << 20).hex().encode().join([b'{"prompt": "a"}\n{"prompt": "', b'"}\n']))
    path.write_bytes(gzip.compress(path.read_bytes()))
    rows = unchanged_rows(config := make(), input_digest(config))
    next(rows)
    with path.open("r+b") as file:
        file.seek(2 << 20)
        file.write(bytes(1 << 20))
    with pytest.raises(InputChanged):
        list(rows)


def test_an_input_that_is_missing_or_closed_is_one_line(make: Callable[..., RunConfig], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=rf"batch\.input={tmp_path}/in\.jsonl: no such file"):
        input_digest(make())
    (tmp_path / "in.jsonl").write_bytes(lines(1))
    monkeypatch.setattr(digests.artifacts, "file_digest", lambda path: path.with_name("gone").read_bytes())
    with pytest.raises(InputError, match=rf"batch\.input={tmp_path}/in\.jsonl: cannot be read \(No such file"):
        input_digest(make())
