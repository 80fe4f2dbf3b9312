"""What `batch` writes: parts of answers and of errors, as Parquet, JSONL or lines of OpenAI's Batch output.

A part appears whole or not at all. A killed job may still write a part after the next job has started: `deduplicate` keeps each
row once.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hydra_core.errors import StoppedError
from hydra_core.storage import as_path, open_stream, opened
from pipelines.batch.backend import Response
from pipelines.batch.openai_format import output_line
from pipelines.batch.reader import BadRow, BatchRow, bad_key, digest
from pipelines.rows.parquet_parts import part_files, write_part
from pipelines.rows.schemas import ERRORS, check_schema, content_id
from pipelines.runtime.console import say
from pipelines.runtime.files import atomic_file, move, remove_file

META = {b"hydra_heads_schema": b"1"}
BATCH = pa.schema([
    ("id", pa.string()), ("row", pa.int64()), ("text", pa.string()), ("token_ids", pa.list_(pa.int32())),
    ("tokens", pa.int32()), ("finish_reason", pa.string()), ("steps", pa.int32()), ("drafted", pa.int32()),
    ("accepted", pa.int32()), ("tokens_per_step", pa.float32()), ("latency_seconds", pa.float32()), ("model", pa.string()),
], metadata=META)
BATCH_ERRORS = pa.schema([*ERRORS, ("row", pa.int64()), ("kind", pa.string())], metadata=META)
INPUT = "input"
"""`kind`: `input`, a row that is not a request; `refused`, such as a prompt that is too long; `failed`, a server error."""


@dataclass(frozen=True)
class Output:
    """Where answers and errors go, and in which format. `label`: the text of the `model` column."""

    folder: str
    kind: str
    label: str
    rows_per_file: int

    @property
    def root(self) -> Path:
        return as_path(self.folder)

    @property
    def rows(self) -> Path:
        return as_path(self.folder) / "rows"

    @property
    def errors(self) -> Path:
        return as_path(self.folder) / "errors"


Made = tuple[bool, dict[str, Any]]
"""Whether a row of the output is an answer, and the row; else it is one of the errors."""


def answered(output: Output, row: BatchRow, response: Response) -> Made:
    """The row of the output for a response."""
    if response.status != 200:
        kind = "failed" if response.status >= 500 else "refused"
        return _error(output, row.id, row.row, kind, response.status, response.message, response.body)
    if output.kind == "openai":
        return True, output_line(row.id, 200, response.body)
    return True, {"id": row.id, "row": row.row, **response.columns, "model": output.label}


def refused(output: Output, bad: BadRow) -> Made:
    """The row of the output for one that could not be sent."""
    return _error(output, bad.id, bad.row, INPUT, 0, bad.message, None)


def _error(output: Output, row_id: str, number: int, kind: str, status: int, message: str, body: dict[str, Any] | None) -> Made:
    if output.kind == "openai":
        return False, output_line(row_id, status, body, message, number if kind == INPUT else None)
    return False, {"id": row_id, "stage": "batch", "row": number, "kind": kind, "message": message}


class Writer:
    """Collects rows and writes a part whenever there are `rows_per_file`; `flush` writes the rest."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self._rows: list[dict[str, Any]] = []
        self._errors: list[dict[str, Any]] = []
        self.done = self.failed = 0

    def add(self, row: BatchRow, response: Response) -> None:
        """Add one row and its response."""
        self.put(answered(self.output, row, response))

    def refuse(self, bad: BadRow) -> None:
        """Add a row that could not be sent."""
        self.put(refused(self.output, bad))

    def put(self, made: Made) -> None:
        """Add a row of the output."""
        is_answer, row = made
        if is_answer:
            self.done += 1
            self._rows.append(row)
            if len(self._rows) >= self.output.rows_per_file:
                self._rows = self._write(self.output.rows, self._rows, BATCH)
            return
        self.failed += 1
        self._errors.append(row)
        if len(self._errors) >= self.output.rows_per_file:
            self._errors = self._write(self.output.errors, self._errors, BATCH_ERRORS)

    def flush(self) -> None:
        self._rows = self._write(self.output.rows, self._rows, BATCH)
        self._errors = self._write(self.output.errors, self._errors, BATCH_ERRORS)

    def _write(self, folder: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> list[dict[str, Any]]:
        if rows:
            _write_rows(folder, rows, schema, self.output.kind)
        return []


@dataclass
class OutputTotals:
    """Totals over the parts of a folder, each row once. `ids`: digests; `parts`: the files that hold these rows; `latencies`: in
    seconds, where known."""

    ids: set[bytes] = field(default_factory=set)
    parts: list[Path] = field(default_factory=list)
    tokens: int = 0
    later_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    latencies: array[float] = field(default_factory=lambda: array("f"))
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, row: dict[str, Any]) -> None:
        self.ids.add(_key(row))
        if "custom_id" in row:
            usage = (row["response"]["body"].get("usage") or {}) if row["error"] is None else {}
            counts = usage.get("speculative") or {}
            row = counts | {"tokens": usage.get("completion_tokens"), "kind": _error_kind(row)}
        tokens, steps = row.get("tokens") or 0, row.get("steps") or 0
        self.tokens, self.steps = self.tokens + tokens, self.steps + steps
        self.later_tokens += max(0, tokens - 1) if steps else 0
        self.drafted += row.get("drafted") or 0
        self.accepted += row.get("accepted") or 0
        if row.get("latency_seconds") is not None:
            self.latencies.append(row["latency_seconds"])
        if row.get("kind"):
            self.kinds[row["kind"]] += 1


def deduplicate(folder: Path, kind: str, schema: pa.Schema, elsewhere: set[bytes] | None = None) -> OutputTotals:
    """Read every part, one at a time; remove rows that an earlier part or `elsewhere` (digests of ids) holds. Returns totals.

    A part that is none is set aside. Raises StoppedError for one that the file system does not give.
    """
    found = OutputTotals()
    taken = elsewhere or set()
    rewritten: set[Path] = set()
    for path in parts(folder, kind):
        if path in rewritten:  # a part is named after its rows: the rest of an earlier part has this name now
            continue
        try:
            rows = list(_read(path, kind, schema))
        except (ValueError, KeyError, OSError, pa.ArrowException) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            if getattr(error, "errno", None) is not None:  # the disk's fault: the rows may well be there
                raise StoppedError(f"{path}: cannot be read now ({reason}): run again when it can; nothing was removed") from None
            set_aside(path, "torn", f"cannot be read ({reason})", ", and its rows are asked for again")
            continue
        kept = []
        for row in rows:
            key = _key(row)
            if key not in found.ids and key not in taken:
                kept.append(row)
                found.add(row)
        if len(kept) == len(rows):
            found.parts.append(path)
            continue
        if kept:
            rewritten.add(_write_rows(folder, kept, schema, kind))
        if path not in rewritten:
            remove_file(path)
    found.parts += sorted(rewritten)
    return found


def set_aside(path: Path, name: str, why: str, then: str = "") -> None:
    """Rename a part that is none, such as one that a power cut tore, with a line for the user."""
    aside = path.with_name(f".{path.name}.{name}")
    move(path, aside)
    say("batch", f"{path} {why}: it is now {aside.name}{then}")


def parts(folder: Path, kind: str) -> list[Path]:
    """Finished part files of an output folder."""
    if kind == "parquet":
        return part_files(folder)
    return sorted(folder.glob("part-*.jsonl")) if folder.exists() else []


def read_batch_rows(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Rows of the finished parts, one part in memory at a time."""
    for path in parts(folder, kind):
        yield from _read(path, kind, BATCH)


def _read(path: Path, kind: str, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    if kind == "parquet":
        with pq.ParquetFile(opened(path)) as part:
            check_schema(part.schema_arrow, schema, str(path))
            yield from part.read().to_pylist()
        return
    with open_stream(path) as lines:  # bytes: an answer may hold other line ends of text, such as U+2028
        yield from map(json.loads, lines)


def _write_rows(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema, kind: str) -> Path:
    names = [_name(row) for row in rows]
    if kind == "parquet":
        return write_part(folder, rows, schema, names=names)
    path = folder / f"part-{content_id(sorted(names))}.jsonl"
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def _id(row: dict[str, Any]) -> str:
    return str(row["custom_id"] if "custom_id" in row else row["id"])


def _name(row: dict[str, Any]) -> str:
    """What a row has in the name of its part: a bad row may have the id of another one, whose part it must not replace."""
    return f"bad row {_key(row).hex()}" if _is_bad(row) else _id(row)


def _is_bad(row: dict[str, Any]) -> bool:
    return (_error_kind(row) if "custom_id" in row else row.get("kind")) == INPUT


def _key(row: dict[str, Any]) -> bytes:
    """What tells a row of an output from the others: its id, or, of a row that was never a request, its place in the input."""
    if _is_bad(row):
        return bad_key(row["id"] if "custom_id" in row else row["row"])
    return digest(_id(row))


def _error_kind(row: dict[str, Any]) -> str | None:
    """The kind of a line of an errors file, from its status."""
    if row["error"] is None:
        return None
    if row["response"] is None:
        return "input"
    return "failed" if row["response"]["status_code"] >= 500 else "refused"
