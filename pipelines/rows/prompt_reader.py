"""Reading prompts from text files, Parquet or `datasets`. A bad row becomes a `RowError`; only a bad file stops the job.

A row is `{"prompt": text}` or a chat, `{"messages": [{"role", "content"}, ...]}` in any form that `conversations` reads (other
columns are kept as `extra`), or Spec-Bench's `{"question_id", "category", "turns"}`, of which the first turn is the prompt. A
chat that ends with the assistant's answer asks without it: the base gives an answer of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hydra_core.errors import InputError
from hydra_core.storage import as_path, is_remote, local_copy, opened
from pipelines.rows import text_files
from pipelines.rows.conversations import COLUMNS, BadChat, normal_chat, without_answer
from pipelines.rows.text_files import BadLine

PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class PromptRow:
    """One prompt: text or a chat.

    `row`: its number in the file, from 1 (JSONL: number of its line); `extra`: its other columns; `turns`: all user turns of a
    row in Spec-Bench's format, of which `prompt` is the first.
    """

    row: int
    prompt: str | None
    messages: list[dict[str, Any]] | None
    source: str
    extra: dict[str, Any] = field(default_factory=dict)
    turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowError:
    """A row that cannot be used, and the reason. `id`: the one that it gives itself, if it can be read."""

    row: int
    message: str
    id: str | None = None


def own_id(values: dict[str, Any]) -> str | None:
    """The id that a row gives itself as `id`, `prompt_id` or `custom_id`, as text."""
    given = (values.get(name) for name in ("id", "prompt_id", "custom_id"))
    return next((str(value) for value in given if value not in (None, "")), None)


def read_prompt_rows(path: str | Path, name: str = "prompt", limit: int | None = None,
                     tap: Callable[[bytes], object] | None = None) -> Iterator[PromptRow | RowError]:
    """Rows of a Parquet file (.parquet, .pq), a folder of those, or a text file that `text_files` reads, at most `limit`.

    `tap`: sees the bytes of a text file, as in `text_files.read_values`.

    Raises InputError for a file that is missing, empty, unreadable, or in which no row has the field `name`.
    """
    path = as_path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    parquet = path.is_dir() or path.suffix.lower() in PARQUET
    yield from _checked(_parquet(path) if parquet else read_values(path, tap), str(path), name, limit)


def read_dataset_rows(path: str, split: str, name: str = "prompt",
                      limit: int | None = None) -> Iterator[PromptRow | RowError]:
    """Rows of a data set: a folder written by `save_to_disk`, or an argument of `datasets.load_dataset`.

    Raises InputError when it cannot be loaded or has no such split.
    """
    import datasets

    path = str(local_copy(path)) if is_remote(path) else path
    try:
        if (Path(path) / "dataset_info.json").exists() or (Path(path) / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(path)
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            loaded = datasets.load_dataset(path, split=split)
    except Exception as error:  # the library raises a dozen types when it cannot load a data set
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"prompts.path={path}: the data set cannot be loaded ({reason})") from None
    yield from _checked(enumerate(loaded, start=1), path, name, limit)


def read_values(path: Path, tap: Callable[[bytes], object] | None = None) -> Iterator[tuple[int, Any]]:
    """Number from 1 and JSON value of every row of a text file; a RowError for a row that cannot be read. `tap` as there."""
    for number, value in text_files.read_values(path, tap):
        yield number, RowError(number, f"row {number}: {value}") if isinstance(value, BadLine) else value


def prompt_files(path: Path) -> list[Path]:
    """The files with the prompts of `path`, in order: `path` itself, or the Parquet files of a folder."""
    return sorted(file for file in path.iterdir() if file.suffix.lower() in PARQUET) if path.is_dir() else [path]


def _checked(values: Iterable[tuple[int, Any]], where: str, name: str,
             limit: int | None) -> Iterator[PromptRow | RowError]:
    """Parse each numbered value. Raises InputError for a file without a usable row."""
    seen, usable, first_error = 0, 0, ""
    held: list[RowError] = []
    for number, value in values:
        if limit is not None and seen >= limit:
            break
        seen += 1
        item = value if isinstance(value, RowError) else _parse(number, value, where, name)
        if isinstance(item, RowError) and isinstance(value, dict) and _column_without_utf8(value) is None:
            item = replace(item, id=own_id(value))
        if isinstance(item, PromptRow):
            yield from held
            held, usable = [], usable + 1
            yield item
        elif usable:
            yield item
        else:
            first_error = first_error or item.message
            held.append(item)
    if not seen:
        raise InputError(f"{where}: is empty: give at least one row with a `{name}` field")
    if not usable:
        raise InputError(f"{where}: none of its {seen} rows is usable; {first_error}")


def _parse(number: int, value: Any, where: str, name: str) -> PromptRow | RowError:
    if not isinstance(value, dict):
        return RowError(number, f"row {number}: is not an object with a `{name}` field")
    if (column := _column_without_utf8(value)) is not None:
        return RowError(number, f"row {number}: {column}: holds half a character (a lone surrogate): write it as UTF-8 text")
    source = str(value.get("source") or Path(where).name)
    if isinstance(value.get("turns"), list) and name not in value:
        turns = value["turns"]
        for place, turn in enumerate(turns or [None], start=1):
            if not isinstance(turn, str) or not turn:
                return RowError(number, f"row {number}: turns: number {place} is not text")
        return PromptRow(number, turns[0], None, source, {k: v for k, v in value.items() if k != "turns"}, tuple(turns))
    extra = {key: item for key, item in value.items() if key not in (name, *COLUMNS)}
    found = value.get(name)
    if isinstance(found, str) and found.strip() and name not in COLUMNS:
        return PromptRow(number, found, None, source, extra)
    column = name if isinstance(found, list) or name in COLUMNS else next(
        (column for column in COLUMNS if value.get(column) is not None), None)
    if column is not None and value.get(column) is not None:
        try:
            return PromptRow(number, None, without_answer(normal_chat(value[column])), source, extra)
        except BadChat as error:
            return RowError(number, f"row {number}: {column}{'' if str(error).startswith('[') else ': '}{error}")
    if name not in value:
        return RowError(number, f"row {number}: has no field `{name}` (its fields: {', '.join(map(str, value)) or 'none'})")
    return RowError(number, f"row {number}: {name}: is empty or not text")


def _column_without_utf8(row: dict[str, Any]) -> str | None:
    """Name of the first column that cannot be written as UTF-8, or None: JSON can express half a surrogate pair."""
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False, default=repr).encode()
        except UnicodeEncodeError:
            return ascii(name)[1:-1]
    return None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and values of every row, counted over all files of a folder."""
    files, number = prompt_files(path), 0
    if not files:
        raise InputError(f"{path}: holds no .parquet file")
    for file in files:
        try:
            with pq.ParquetFile(opened(file)) as shard:
                for batch in shard.iter_batches(1024):
                    for row in _rows_of(batch):
                        number += 1
                        yield number, RowError(number, f"row {number}: is not UTF-8 text") if row is None else row
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for a row whose text is not UTF-8, which Arrow does not check."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None
