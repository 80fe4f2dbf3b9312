"""What `batch` reads: rows of prompts or of OpenAI's Batch format, one at a time, and the order in which they are sent."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from hydra_core.storage import as_path
from pipelines.config import RunConfig
from pipelines.config.run import BatchSection
from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.prompt_reader import PARQUET, PromptRow, RowError, own_id, read_prompt_rows, read_values
from pipelines.rows.schemas import PROMPTS, content_id
from pipelines.runtime.artifacts import RunPaths
from pipelines.serve.messages import is_text

URLS = ("/v1/chat/completions", "/v1/completions")
WINDOW = 2048
"""Rows that are held in memory to be sorted."""
BEGINNING = 128
"""Characters of a text that count as its beginning; the beginning of a chat is its whole system message."""
LOOKED_AT = 100
"""Lines at the start of a file that decide its format."""


@dataclass(frozen=True)
class BatchRow:
    """One row to answer. One of `prompt` (templated), `messages`, `prompt_ids` and `body` is given; `body` is a request to `url`
    in OpenAI's format. `row`: its number in the file, from 1."""

    id: str
    row: int
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_ids: list[int] | None = None
    url: str | None = None
    body: dict[str, Any] | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that is not a request, under the id that it has in the errors file."""

    id: str
    row: int
    message: str


@dataclass
class Reading:
    """Reads the rows of an input, each id once, and counts them. `refuse`: called for rows that are not requests. Only digests
    of ids and contents are kept in memory."""

    refuse: Callable[[BadRow], None]
    rows: int = 0
    skipped: int = 0

    def todo(self, source: Iterable[BatchRow | BadRow], known: Set[bytes]) -> Iterator[BatchRow]:
        """The rows whose ids are not `known`. A row that repeats an earlier one is skipped; one that repeats its id alone, with
        another content, is refused."""
        seen: dict[bytes, bytes] = {}  # digest of an id -> number of its row, digest of its content
        for item in source:
            self.rows += 1
            if isinstance(item, BadRow):
                self.refuse(item)
                continue
            key, content = digest(item.id), _content_digest(item)
            if (earlier := seen.get(key)) is not None:
                if earlier[8:] == content:
                    self.skipped += 1
                else:
                    first = int.from_bytes(earlier[:8], "big")
                    self.refuse(BadRow(item.id, item.row, f"row {item.row}: id {item.id[:80]!r} belongs to row {first} already, "
                                                          "which asks for something else: give each row an id of its own"))
                continue
            seen[key] = item.row.to_bytes(8, "big") + content
            if key not in known:
                yield item


def _content_digest(row: BatchRow) -> bytes:
    content = json.dumps([row.prompt, row.messages, row.prompt_ids, row.url, row.body], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).digest()


def bad_key(name: str | int) -> bytes:
    """16 bytes for a row that cannot be sent, by its number in the file or the id of its line in a Batch output: in a space of
    their own, so that no id of a user's is among them."""
    return hashlib.blake2b(str(name).encode(), digest_size=16, person=b"bad row").digest()


def digest(row_id: str) -> bytes:
    """16 bytes (BLAKE2b) that stand for an id of any length."""
    return hashlib.blake2b(row_id.encode(), digest_size=16).digest()


def input_kind(section: BatchSection) -> str:
    """`parquet`, `jsonl` or `openai`. Raises InputError for a missing file, and for a file in another format than OpenAI's Batch
    format where `batch.format` asks for that."""
    if section.source is None:
        kind = "parquet"
    else:
        path = as_path(section.source)
        if not path.exists():
            raise InputError(f"batch.input={path}: no such file")
        kind = "parquet" if path.is_dir() or path.suffix.lower() in PARQUET else "jsonl"
        if kind == "jsonl" and _is_openai(path):
            kind = "openai"
    if section.format == "openai" and kind != "openai":
        raise InputError(f"batch.format=openai: {section.source or 'the input'} is not in that format, whose lines hold "
                         "custom_id, method, url and body")
    return kind


def output_kind(section: BatchSection) -> str:
    """The kind of the input, unless `batch.format` names another. Raises InputError as `input_kind` does."""
    kind = input_kind(section)
    return kind if section.format == "auto" else section.format


def read_rows(config: RunConfig, tap: Callable[[bytes], object] | None = None) -> Iterator[BatchRow | BadRow]:
    """Every row of the input, in order. `tap`: sees the bytes of a text file as they are read. Raises InputError for a file
    without a usable row."""
    section = config.batch
    if section.source is None:
        yield from _held_out(config)
    elif input_kind(section) == "openai":
        yield from _openai(section.source, section.limit, one_choice=output_kind(section) != "openai", tap=tap)
    else:
        for item in read_prompt_rows(section.source, section.field, section.limit, tap):
            yield BadRow(item.id or f"row-{item.row}", item.row, item.message) if isinstance(item, RowError) else _row(item)


def ordered(rows: Iterable[BatchRow], window: int = WINDOW) -> Iterator[BatchRow]:
    """Sort rows so that those with the same beginning follow each other, and long ones come first: the engine reuses the keys
    and values of a shared prefix, and sequences of similar length need little padding. At most `window` rows are held."""
    source = iter(rows)
    while held := list(islice(source, window)):
        shared = Counter(_beginning(row) for row in held)
        held.sort(key=lambda row: (_beginning(row) if shared[_beginning(row)] > 1 else "", -_length(row)))
        yield from held


def _row(item: PromptRow) -> BatchRow:
    return BatchRow(own_id(item.extra) or content_id(item.row, item.prompt, item.messages), item.row, item.prompt, item.messages)


def _held_out(config: RunConfig) -> Iterator[BatchRow]:
    """The prompts of this run's `distill`: the held-out ones, and after them the others where `limit` is larger."""
    rows = read_parts(RunPaths.of(config).stage("distill") / "prompts", PROMPTS).to_pylist()
    held_out = sorted((row for row in rows if row["split"] == "held_out"), key=lambda row: row["prompt_id"])
    rest = sorted((row for row in rows if row["split"] != "held_out"), key=lambda row: row["prompt_id"])
    for number, row in enumerate((held_out + rest)[:config.batch.limit or len(held_out)], start=1):
        messages = None if row["messages"] is None else json.loads(row["messages"])
        yield BatchRow(row["prompt_id"], number, row["prompt"], messages, row["prompt_ids"])


def _is_openai(path: Path) -> bool:
    """Whether one of the first lines has the keys of a request."""
    return any(isinstance(value, dict) and {"custom_id", "url", "body"} <= set(value)
               for _, value in islice(read_values(path), LOOKED_AT))


def _openai(path: str, limit: int | None, one_choice: bool,
            tap: Callable[[bytes], object] | None) -> Iterator[BatchRow | BadRow]:
    """`one_choice`: a row of the output holds one answer."""
    for number, value in islice(read_values(as_path(path), tap), limit):
        if isinstance(value, RowError):
            yield BadRow(f"row-{number}", number, value.message)
            continue
        name = value.get("custom_id") if isinstance(value, dict) else None
        if problem := _problem(value, one_choice):
            named = isinstance(name, str) and name and is_text(name)
            yield BadRow(str(name) if named else f"row-{number}", number, f"row {number}: {problem}")
        else:
            yield BatchRow(str(name), number, url=value["url"], body=value["body"])


def _problem(value: Any, one_choice: bool) -> str | None:
    """What is wrong with one line of the Batch format; None: nothing."""
    if not isinstance(value, dict):
        return "is not an object with custom_id, method, url and body"
    if not isinstance(value.get("custom_id"), str) or not value["custom_id"]:
        return "custom_id: is missing or not text"
    if value.get("method", "POST") != "POST":
        return f"method: is {value['method']!r}, not 'POST'"
    if value.get("url") not in URLS:
        return f"url: is {value.get('url')!r}, not one of {', '.join(URLS)}"
    if not isinstance(value.get("body"), dict):
        return "body: is missing or not an object"
    if not is_text(value):
        return "holds half a character (a lone surrogate): write it as UTF-8 text"
    if one_choice and value["body"].get("n") not in (None, 1):
        return f"n: {str(value['body']['n'])[:20]} answers need batch.format=openai; a row of the other formats holds one"
    return None


def _texts(row: BatchRow) -> list[str]:
    """The texts of a row as far as it is well-formed; only the order of rows depends on them."""
    body = row.body or {}
    messages = row.messages or body.get("messages")
    if isinstance(messages, list) and messages:
        return [str(message.get("content")) for message in messages if isinstance(message, dict)]
    return [str(row.prompt if row.prompt is not None else row.prompt_ids or body.get("prompt"))]


def _beginning(row: BatchRow) -> str:
    messages = row.messages or (row.body or {}).get("messages")
    first = messages[0] if isinstance(messages, list) and messages else None
    if isinstance(first, dict) and first.get("role") == "system":
        return str(first.get("content"))
    return (_texts(row) or [""])[0][:BEGINNING]


def _length(row: BatchRow) -> int:
    return sum(map(len, _texts(row)))
