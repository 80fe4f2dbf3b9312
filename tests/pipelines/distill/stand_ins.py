"""Actors of `distill` for tests: one that is killed, one that answers without a model. Ray's workers import them from here."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_core.decoding import Result
from hydra_core.sampling import Request
from pipelines.config import BaseSection, PromptsSection
from pipelines.distill.actors import Answerer, PromptMaker, WorkerSettings
from pipelines.distill.file_prompts import SOURCE, PromptReader, Templater, TemplateSettings
from pipelines.distill.tasks import ANSWERED, PartWriter, rows_of
from pipelines.rows.parquet_parts import part_files
from pipelines.runtime.row_flow import Rows

BASE = "stand-in@0:fp32"


def file_prompts(path: Path, tokenizer: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Prompt rows and error rows of a JSONL file, and the counts, as tasks of Ray make them."""
    templater = Templater(TemplateSettings(BaseSection(), "", str(path), 0.1), tokenizer)
    found: dict[str, list[dict[str, Any]]] = {"prompts": [], "errors/prompts": []}
    counts: Counter[str] = Counter()
    for read in PromptReader(PromptsSection(source="jsonl", path=str(path)))(SOURCE[0]):
        for rows in templater(read):
            found[rows.name] += rows.table.to_pylist()
            counts.update(rows.counts)
    return found["prompts"], found["errors/prompts"], counts


def folder_of(settings: WorkerSettings) -> Path:
    """The folder of the stage, beside the cache."""
    return Path(settings.cache).parent / "runs" / "default" / "distill"


def die_once(cache: Path, name: str, parts: Path | None = None) -> None:
    """Kill this process, once for each name; if `parts` is given, when a part stands there."""
    marker = cache / f"killed-{name}"
    if marker.exists():
        return
    while parts is not None and not part_files(parts):
        time.sleep(0.01)
    time.sleep(random.SystemRandom().uniform(0, 0.3))
    cache.mkdir(parents=True, exist_ok=True)
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:  # another process has just died of it
        return
    os.kill(os.getpid(), signal.SIGKILL)


class KilledAnswerer(Answerer):
    """The base's own rows, whose answers end in any order. It is killed once after some answers of a block are written, and once
    after some hidden states."""

    def __call__(self, given: Rows) -> Iterator[Rows]:
        handed_on = set()
        for rows in super().__call__(given):
            if rows.name in handed_on:
                self.die(rows.name)
            handed_on.add(rows.name)
            yield rows

    def decode(self, requests: Iterable[Request], what: str) -> Iterator[Result]:
        results = list(super().decode(requests, what))
        return iter(random.SystemRandom().sample(results, len(results)))

    def _part_rows(self, rows: list[dict[str, Any]]) -> int:
        return 8

    def die(self, name: str) -> None:
        """Once for each name, when a part of it stands."""
        die_once(Path(self.settings.cache), name, folder_of(self.settings) / name)


class WritingPromptMaker(PromptMaker):
    """Writes prompts by their number, in any order: some are alike, some do not end."""

    def decode(self, requests: Iterable[Request], what: str) -> Iterator[Result]:
        wanted = list(requests)
        for request in random.SystemRandom().sample(wanted, len(wanted)):
            number = int(request.id)
            text = "question" if number % 7 == 3 else f"word {number}"
            ids = tuple(self.base.tokenizer(text).input_ids)
            yield Result(request.id, request.prompt_ids, (*ids, 2), "length" if number % 5 == 1 else "stop")


class KilledPromptMaker(WritingPromptMaker):
    """It is killed once when a part of its first block stands."""

    def __call__(self, given: Rows) -> Iterator[Rows]:
        for number, rows in enumerate(super().__call__(given)):
            if number == 2:
                die_once(Path(self.settings.cache), "maker", folder_of(self.settings) / "candidates")
            yield rows


@dataclass(frozen=True)
class KilledWriter(PartWriter):
    """Its process is killed once before it writes a part, and once after it has."""

    def __call__(self, rows: Rows) -> None:
        cache = self.folder.parents[2] / "cache"
        die_once(cache, "before writing")
        super().__call__(rows)
        die_once(cache, "after writing")


class IdleTemplater(Templater):
    """Gives every prompt the same token ids."""

    def __init__(self, settings: TemplateSettings) -> None:
        super().__init__(settings, "none")

    def _row(self, raw: dict[str, Any]) -> dict[str, Any] | str:
        if raw["error"] is not None:
            return str(raw["error"])
        return {name: raw[name] for name in ("prompt_id", "messages", "prompt", "source")} | {"prompt_ids": [5], "split": "train"}


class IdleAnswerer:
    """Answers each prompt with its own first token, and hidden states of four bytes."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings

    def __call__(self, given: Rows) -> Iterator[Rows]:
        rows = given.table.to_pylist()
        if given.name != ANSWERED:
            rows = [{**row, "response_ids": row["prompt_ids"][:1], "finish_reason": "stop", "base": BASE} for row in rows]
            yield rows_of("responses", [{name: row[name] for name in row if name != "has_features"} for row in rows])
        held_out = [row for row in rows if not row.pop("has_features", False) and row["split"] == "held_out"]
        if held_out:
            yield rows_of("features", [{**row, "hidden": b"\0" * 4, "hidden_dtype": "fp32", "hidden_tokens": 1, "hidden_width": 1,
                                        "hidden_layer": "last"} for row in held_out])
