"""The flow of a user's prompts: a file or a data set is read by one task, the chat template is applied by several.

    prompts.path -> rows of the file in pieces, repeated ones marked -> token ids -> parts of prompts/ and errors/prompts/
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from hydra_core.base import encode_prompt, load_tokenizer, resolve_base
from hydra_core.errors import InputError
from pipelines.config import BaseSection, PromptsSection
from pipelines.distill.tasks import rows_of
from pipelines.rows.prompt_reader import PromptRow, RowError, read_dataset_rows, read_prompt_rows
from pipelines.rows.row_ids import among, merged, row_digests
from pipelines.rows.schemas import content_id, split_of
from pipelines.runtime.row_flow import Rows

PART_ROWS = 4096
READ = "read"
SOURCE = [pa.table({"path": [0]})]
"""One task reads all rows: whether one repeats another is known to nobody else. It holds a piece of them, and 16 bytes each."""
_RAW = pa.schema([("row", pa.int64()), ("error", pa.string()), ("prompt_id", pa.string()), ("prompt", pa.string()),
                  ("messages", pa.string()), ("source", pa.string()), ("repeated", pa.bool_())])


def prompt_rows(section: PromptsSection) -> Iterator[PromptRow | RowError]:
    """The rows of `prompts.path`, the first one of them once there is a usable one.

    Raises InputError for a file that is missing, empty or never has the field.
    """
    assert section.path is not None
    if section.source == "datasets":
        return read_dataset_rows(section.path, section.split, section.field, section.count)
    return read_prompt_rows(section.path, section.field, section.count)


@dataclass(frozen=True)
class PromptReader:
    """Hands on the rows of a file, `PART_ROWS` at a time, and then how many were `read`. Raises InputError as `prompt_rows`."""

    section: PromptsSection

    def __call__(self, _: pa.Table) -> Iterator[Rows]:
        source, known, read = prompt_rows(self.section), merged(), 0
        while chunk := list(islice(source, PART_ROWS)):
            rows = [_raw(item) for item in chunk]
            digests = row_digests(row["prompt_id"] for row in rows)
            earlier, seen = among(digests, known), set[bytes]()
            for row, digest, stands in zip(rows, digests.tolist(), earlier, strict=True):
                row["repeated"] = bool(stands) or digest in seen
                seen.add(digest)
            known, read = merged(known, digests), read + len(rows)
            yield Rows(READ, pa.Table.from_pylist(rows, schema=_RAW))
        yield Rows(READ, _RAW.empty_table(), {"read": read})


def _raw(item: PromptRow | RowError) -> dict[str, Any]:
    if isinstance(item, RowError):
        return {"row": item.row, "error": item.message, "prompt_id": f"row {item.row}"}
    return {"row": item.row, "prompt": item.prompt, "source": item.source,
            "messages": None if item.messages is None else json.dumps(item.messages), "prompt_id": prompt_id_of(item)}


def prompt_id_of(item: PromptRow) -> str:
    """The id of a prompt row: a digest of its content."""
    return content_id("chat", item.messages if item.messages is not None else item.prompt)


def prompt_ids_of(item: PromptRow, tokenizer: Any) -> list[int] | RowError:
    """Token ids of a row with the chat template applied, or the reason why there are none."""
    try:
        return encode_prompt(tokenizer, item.prompt, item.messages)
    except InputError as error:
        return RowError(item.row, f"row {item.row}: {error}")


@dataclass(frozen=True)
class TemplateSettings:
    """`path`: of the prompts, as the user gave it; `held_out`: share of rows of that split."""

    base: BaseSection
    cache: str
    path: str
    held_out: float


class Templater:
    """Applies the chat template: `prompts`, and `errors/prompts` for rows that are none; repeated rows are `skipped`."""

    def __init__(self, settings: TemplateSettings, tokenizer: Any = None) -> None:
        self.settings = settings
        self.tokenizer = tokenizer or _tokenizer_of(str(resolve_base(settings.base.model, Path(settings.cache)).folder))

    def __call__(self, given: Rows) -> Iterator[Rows]:
        rows, errors, skipped = [], [], 0
        for raw in given.table.to_pylist():
            made = self._row(raw)
            if isinstance(made, str):
                errors.append({"id": f"{self.settings.path}:{raw['row']}", "stage": "distill", "message": made})
            elif raw["repeated"]:
                skipped += 1
            else:
                rows.append(made)
        yield rows_of("prompts", rows, skipped=skipped, **given.counts)
        yield rows_of("errors/prompts", errors)

    def _row(self, raw: dict[str, Any]) -> dict[str, Any] | str:
        """A prompt row, or why it is none."""
        if raw["error"] is not None:
            return str(raw["error"])
        messages = None if raw["messages"] is None else json.loads(raw["messages"])
        ids = prompt_ids_of(PromptRow(raw["row"], raw["prompt"], messages, raw["source"]), self.tokenizer)
        if isinstance(ids, RowError):
            return ids.message
        return {"prompt_id": raw["prompt_id"], "messages": raw["messages"], "prompt": raw["prompt"], "prompt_ids": ids,
                "source": raw["source"], "split": split_of(raw["prompt_id"], self.settings.held_out)}


@lru_cache(maxsize=1)
def _tokenizer_of(folder: str) -> Any:
    """Kept for the tasks that follow in the same process."""
    return load_tokenizer(Path(folder))
