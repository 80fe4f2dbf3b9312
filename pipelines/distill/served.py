"""Rows of what an endpoint has answered: the answers stand already, and only their hidden states are computed.

    records (`rows/served_records.py`) -> prompts/, responses/, errors/prompts/ -> the flow of `answers.py` computes features/

What is read first stays, though the endpoint goes on and removes old records: a run that is killed goes on with the same rows,
and newer records are another run's. The driver reads them, one part at a time: `serve.record.max_bytes` bounds them all.

Answers that the base drew at a temperature are used too, as `distill` itself makes some at temperature 1: their hidden states,
and so the teacher's distributions, are those of text that the base writes. Answers under penalties, top-p and the like are not.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra_core.base import BaseIdentity, context_limit, load_tokenizer, resolve_base
from hydra_core.errors import InputError
from hydra_core.storage import as_path
from pipelines.config import RunConfig
from pipelines.distill.prompts import COUNTS, written_prompts
from pipelines.rows.parquet_parts import number_of_rows, write_part
from pipelines.rows.prompt_reader import RowError
from pipelines.rows.schemas import ERRORS, PROMPTS, RESPONSES, check_counts, content_id, split_of
from pipelines.rows.served_records import ServedRecord, read_records, record_parts
from pipelines.runtime.artifacts import RunPaths, served_folder
from pipelines.runtime.console import say
from pipelines.runtime.files import remove_file, remove_tree, write_text

SKIPPED = {"other_base": "of another base or weight format", "not_the_bases": "not from the base's own distribution",
           "dropped": "dropped by prompts.drop_patterns", "repeated": "repeated", "beyond_count": "beyond prompts.count"}
"""Why a record is left out, in the order in which it is asked, and how a person reads it."""
PART_ROWS = 4096


def check_served(config: RunConfig, folder: Path) -> None:
    """Raise InputError where there are no records, unless they were read already: before Ray is started."""
    if _written(folder) is None and not record_parts(as_path(served_folder(config))):
        raise InputError(f"prompts.path={served_folder(config)}: has no records of answers: start an endpoint with "
                         "serve.record.share above 0, and name its folder")


def read_served(config: RunConfig, folder: Path) -> dict[str, int]:
    """Write prompts, answers and error rows from the records unless they are written already; returns counts, of which
    `answers` + `prompt_errors` + `prompts_skipped` are all records that were read.

    Raises InputError for too many damaged records, and where none can be used.
    """
    if (counts := _written(folder)) is not None:
        return counts
    _remove(folder)  # what stands without counts is from a run that was killed
    try:
        counts = _read(config, folder)
    except BaseException:
        _remove(folder)
        raise
    write_text(folder / COUNTS, json.dumps(counts))
    return counts


def _remove(folder: Path) -> None:
    remove_file(folder / COUNTS)
    for part in ("prompts", "responses", "features", "errors/prompts"):
        remove_tree(folder / part)


def _read(config: RunConfig, folder: Path) -> dict[str, int]:
    """Write the rows; returns the counts."""
    chosen = _Chooser(config)
    for batch in _batches(chosen, record_parts(as_path(served_folder(config)))):
        _write(folder, batch)
    found, path = chosen.counts, f"prompts.path={served_folder(config)}"
    skipped = sum(found[name] for name in SKIPPED)
    why = ", ".join(f"{found[name]} {text}" for name, text in SKIPPED.items() if found[name])
    say("distill", f"records read {found['read']} = {found['answers']} ok + {found['errors']} errors + {skipped} skipped"
                   f"{f' ({why})' if why else ''}")
    check_counts(path, found["read"], found["answers"], found["errors"], skipped, config.distill.max_error_share,
                 f"{chosen.first_error}; remove damaged parts or raise distill.max_error_share")
    if not found["answers"]:
        raise InputError(f"{path}: none of {found['read']} records can be used{f': {why}' if why else ''}")
    return {"prompts": found["prompts"], "prompt_errors": found["errors"], "prompts_skipped": skipped, "self_made": 0,
              "answers": found["answers"], "read": found["read"], **{name: found[name] for name in SKIPPED}}


def _written(folder: Path) -> dict[str, int] | None:
    """The counts of what was read, if all of it stands."""
    counts = written_prompts(folder)
    whole = counts is not None and number_of_rows(folder / "responses", RESPONSES) == counts.get("answers")
    return counts if whole else None


class _Chooser:
    """Decides about each record. Holds 16 bytes for each answer and prompt that it has seen, and a little more."""

    def __init__(self, config: RunConfig) -> None:
        cache = RunPaths.of(config).cache
        resolved = resolve_base(config.base.model, cache)
        self.base = BaseIdentity(resolved.name, resolved.digest, config.base.dtype)
        self.tokenizer = load_tokenizer(resolved.folder)
        self.limit = context_limit(config.base.model, cache=cache, asked=config.base.context_limit)
        self.patterns = [re.compile(pattern) for pattern in config.prompts.drop_patterns]
        self.most, self.longest, self.held_out = config.prompts.count, config.distill.max_new_tokens, config.distill.held_out
        self.counts: Counter[str] = Counter()
        self.first_error = ""
        self._answers: set[bytes] = set()
        self._prompts: set[bytes] = set()

    def rows(self, where: str, found: ServedRecord | RowError) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows that a record becomes, each with the folder that it belongs to."""
        self.counts["read"] += 1
        if isinstance(found, ServedRecord):
            prompt, answer = len(found.prompt_ids), len(found.response_ids[:self.longest])
            if prompt + answer > self.limit:
                found = RowError(0, f"{where}: {prompt} tokens of a prompt and {answer} of its answer are more than the "
                                    f"context of {self.limit}")
        if isinstance(found, RowError):
            self.counts["errors"] += 1
            self.first_error = self.first_error or found.message
            yield "errors/prompts", {"id": f"{where}:{self.counts['read']}", "stage": "distill", "message": found.message}
            return
        prompt_id = content_id("ids", found.prompt_ids)
        row = self._answer(found, prompt_id)
        if (why := self._why_not(found, row["id"])) is not None:
            self.counts[why] += 1
            return
        self.counts["answers"] += 1
        self._answers.add(bytes.fromhex(row["id"]))
        if (key := bytes.fromhex(prompt_id)) not in self._prompts:
            self._prompts.add(key)
            self.counts["prompts"] += 1
            yield "prompts", {"prompt_id": prompt_id, "messages": None, "prompt": self._text(found.prompt_ids),
                              "prompt_ids": list(found.prompt_ids), "source": row["source"], "split": row["split"]}
        yield "responses", row

    def _why_not(self, record: ServedRecord, row_id: str) -> str | None:
        """One of `SKIPPED`, or None for a record that is used."""
        if record.base.rpartition("@")[2] != str(self.base).rpartition("@")[2]:  # the digest, whatever the folder is called
            return "other_base"
        if not record.from_the_base:
            return "not_the_bases"
        if self.patterns and self._has_pattern(record):
            return "dropped"
        if bytes.fromhex(row_id) in self._answers:
            return "repeated"
        return "beyond_count" if self.most is not None and self.counts["answers"] >= self.most else None

    def _has_pattern(self, record: ServedRecord) -> bool:
        text = self._text(record.prompt_ids + record.response_ids)
        return any(pattern.search(text) for pattern in self.patterns)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _answer(self, record: ServedRecord, prompt_id: str) -> dict[str, Any]:
        """A response row. An answer is cut where `distill` would have ended it."""
        cut = record.response_ids[:self.longest]
        whole = len(cut) == len(record.response_ids)
        return {"id": content_id("served", prompt_id, cut, str(self.base)), "prompt_id": prompt_id,
                "prompt_ids": list(record.prompt_ids), "response_ids": list(cut),
                "finish_reason": record.finish_reason if whole else "length", "temperature": record.temperature,
                "seed": record.seed, "source": "served", "split": split_of(prompt_id, self.held_out), "base": str(self.base)}


def _batches(chosen: _Chooser, parts: list[tuple[Path, int]]) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Rows by folder, some thousands at a time, of the latest parts first."""
    held: dict[str, list[dict[str, Any]]] = {"prompts": [], "responses": [], "errors/prompts": []}
    for path, _ in reversed(parts):
        try:
            for record in read_records(path):
                for name, row in chosen.rows(path.name, record):
                    held[name].append(row)
        except FileNotFoundError:  # the endpoint has removed it
            continue
        if len(held["responses"]) >= PART_ROWS:
            yield held
            held = {name: [] for name in held}
    yield held


def _write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    for name, contract in (("responses", RESPONSES), ("prompts", PROMPTS), ("errors/prompts", ERRORS)):
        if rows[name]:
            write_part(folder / name, rows[name], contract, "prompt_id" if name == "prompts" else "id")
