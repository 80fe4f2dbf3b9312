"""Prompt rows from a user's file or data set: with the chat template applied, without duplicates, and split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra_core.base import encode_prompt
from hydra_core.errors import InputError
from pipelines.config import PromptsSection
from pipelines.rows.prompt_reader import PromptRow, RowError, prompt_files, read_dataset_rows, read_prompt_rows
from pipelines.rows.schemas import content_id, split_of
from pipelines.runtime.artifacts import input_digest


def source_digest(section: PromptsSection) -> str | None:
    """Digest of the files that the prompts are read from; None if there is no local file (self-made prompts, a hub id).

    Raises InputError for a file that does not exist.
    """
    if section.path is None:
        return None
    path = Path(section.path)
    if not path.exists():
        if section.source == "datasets":
            return None
        raise InputError(f"prompts.path={path}: no such file")
    every = section.source == "datasets" and path.is_dir()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if every else prompt_files(path)
    return content_id(*([str(file.relative_to(path)), input_digest("prompts.path", file)] for file in files))


def file_prompts(section: PromptsSection, tokenizer: Any,
                 held_out: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Rows of schemas.PROMPTS, rows of schemas.ERRORS, and the number of duplicates that are left out.

    Raises InputError for a file that is missing, empty or never has the field.
    """
    assert section.path is not None
    if section.source == "datasets":
        source = read_dataset_rows(section.path, section.split, section.field, section.count)
    else:
        source = read_prompt_rows(section.path, section.field, section.count)
    rows: dict[str, dict[str, Any]] = {}
    errors, skipped = [], 0
    for item in source:
        made = item if isinstance(item, RowError) else _prompt_row(item, tokenizer, held_out)
        if isinstance(made, RowError):
            errors.append({"id": f"{section.path}:{made.row}", "stage": "distill", "message": made.message})
        elif made["prompt_id"] in rows:
            skipped += 1
        else:
            rows[made["prompt_id"]] = made
    if not rows:
        first = f": {errors[0]['message']}" if errors else ""
        raise InputError(f"prompts.path={section.path}: has no usable prompt{first}")
    return list(rows.values()), errors, skipped


def prompt_ids_of(item: PromptRow, tokenizer: Any) -> list[int] | RowError:
    """Token ids of a row with the chat template applied, or the reason why there are none."""
    try:
        return encode_prompt(tokenizer, item.prompt, item.messages)
    except InputError as error:
        return RowError(item.row, f"row {item.row}: {error}")


def _prompt_row(item: PromptRow, tokenizer: Any, held_out: float) -> dict[str, Any] | RowError:
    ids = prompt_ids_of(item, tokenizer)
    if isinstance(ids, RowError):
        return ids
    prompt_id = content_id("chat", item.messages if item.messages is not None else item.prompt)
    return {"prompt_id": prompt_id, "messages": None if item.messages is None else json.dumps(item.messages),
            "prompt": item.prompt, "prompt_ids": ids, "source": item.source, "split": split_of(prompt_id, held_out)}
