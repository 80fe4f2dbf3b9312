"""Reading what `distill` wrote, for the data card: each folder part by part, the texts of prompts never all at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab
from pipelines.config import RunConfig
from pipelines.datacard.counts import NONE_GIVEN, Group, most_frequent, quantiles, source_name, task_of
from pipelines.datacard.languages import can_detect, languages_of, text_of
from pipelines.distill.file_prompts import prompt_id_of, prompt_rows
from pipelines.rows.parquet_parts import iter_parts
from pipelines.rows.prompt_reader import PromptRow
from pipelines.rows.schemas import ERRORS, PROMPTS, RESPONSES

KINDS = ("sources", "tasks")
FILES = ("jsonl", "parquet")
"""Kinds of `prompts.source` that are read again for tasks: a hub's data set would be fetched for it."""


@dataclass
class Rows:
    """All counts over the rows of a `distill`. `groups`: kind (source, task) -> name -> its counts; `kinds_of`: prompt id ->
    name of its source and of its task; `split_rows`: prompts by split; `finish`: answers by the reason why they ended; `notes`:
    what could not be measured, and why."""

    groups: dict[str, dict[str, Group]] = field(default_factory=lambda: {kind: {} for kind in KINDS})
    kinds_of: dict[str, tuple[str, str]] = field(default_factory=dict)
    prompt_lengths: dict[str, float] = field(default_factory=dict)
    answer_lengths: dict[str, float] = field(default_factory=dict)
    split_rows: Counter[str] = field(default_factory=Counter)
    finish: Counter[str] = field(default_factory=Counter)
    languages: dict[str, int] = field(default_factory=dict)
    errors: list[tuple[str, int]] = field(default_factory=list)
    repeated_answers: int = 0
    coverage: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, prompt_id: str) -> list[Group]:
        """The groups that a prompt belongs to."""
        names = self.kinds_of.get(prompt_id, (NONE_GIVEN, NONE_GIVEN))
        return [self.groups[kind].setdefault(name, Group()) for kind, name in zip(KINDS, names, strict=True)]


def gather(config: RunConfig, folder: Path, vocabulary_size: int, stop_ids: tuple[int, ...]) -> Rows:
    """Count everything in the `distill` folder. Raises InputError for parts that cannot be read."""
    rows = Rows()
    _add_prompts(config, folder, rows)
    counts = _add_answers(folder, rows, vocabulary_size)
    _add_coverage(config, folder, rows, counts, stop_ids)
    rows.languages = _languages(config, folder, rows)
    rows.errors = most_frequent(message for part in ("prompts", "answers")
                                for _, found in iter_parts(folder / "errors" / part, ERRORS, ["message"])
                                for message in found["message"].to_pylist())
    return rows


def _add_prompts(config: RunConfig, folder: Path, rows: Rows) -> None:
    tasks = _tasks(config, rows)
    lengths = []
    for _, found in iter_parts(folder / "prompts", PROMPTS, ["prompt_id", "prompt_ids", "source", "split"]):
        for one in found.to_pylist():
            lengths.append(len(one["prompt_ids"]))
            rows.split_rows[one["split"]] += 1
            rows.kinds_of[one["prompt_id"]] = source_name(one["source"]), tasks.get(one["prompt_id"], NONE_GIVEN)
            for group in rows.of(one["prompt_id"]):
                group.prompts += 1
                group.held_out += one["split"] == "held_out"
    rows.prompt_lengths = quantiles(lengths)


def _tasks(config: RunConfig, rows: Rows) -> dict[str, str]:
    """Prompt id -> the task that the file of prompts names for it: rows of `distill` keep their source alone."""
    prompts = config.prompts
    if prompts.source not in FILES:
        rows.notes.append(f"tasks: not known, as rows of prompts.source={prompts.source} name none")
        return {}
    found: dict[str, str] = {}
    try:
        for item in prompt_rows(prompts):
            if isinstance(item, PromptRow) and (task := task_of(item.extra, config.datacard.task_fields)) != NONE_GIVEN:
                found.setdefault(prompt_id_of(item), task)
    except InputError as error:
        rows.notes.append(f"tasks: not known, as the file of prompts cannot be read any more ({error})")
        return {}
    if not found:
        rows.notes.append(f"tasks: not known, as no row of {prompts.path} has a column "
                          f"{' or '.join(config.datacard.task_fields)}")
    return found


def _add_answers(folder: Path, rows: Rows, vocabulary_size: int) -> np.ndarray:
    """Count answers; returns how often each token occurs in those that heads learn from: [V] int64."""
    counts, lengths, seen = np.zeros(vocabulary_size, np.int64), list[int](), set[int]()
    columns = ["prompt_id", "response_ids", "finish_reason", "split"]
    for _, one, answer in _answers(folder, columns):
        lengths.append(len(answer))
        rows.finish[one["finish_reason"]] += 1
        digest = hash(answer.tobytes())
        rows.repeated_answers += digest in seen
        seen.add(digest)
        for group in rows.of(one["prompt_id"]):
            group.answers += 1
            group.tokens += len(answer)
        if one["split"] == "train":
            np.add.at(counts, answer, 1)
    rows.answer_lengths = quantiles(lengths)
    return counts


def _add_coverage(config: RunConfig, folder: Path, rows: Rows, counts: np.ndarray, stop_ids: tuple[int, ...]) -> None:
    """How many tokens of each group the draft vocabularies of `train.drafters` hold, ranked from the answers as `train` does."""
    total = torch.from_numpy(counts)
    vocabularies = {size: DraftVocab.rank(total, size, stop_ids) for size in
                    sorted({heads.draft_vocab_size or len(counts) for heads in config.train.drafters.values()})}
    rows.coverage = {size: round(vocabulary.coverage(total), 4) for size, vocabulary in vocabularies.items()}
    held = {size: (vocabulary.index_of >= 0).numpy() for size, vocabulary in vocabularies.items()}
    for _, one, answer in _answers(folder, ["prompt_id", "response_ids"]):
        for group in rows.of(one["prompt_id"]):
            for size, drafted in held.items():
                group.covered[size] += int(drafted[answer].sum())


def _answers(folder: Path, columns: list[str]) -> Iterator[tuple[Path, Mapping[str, Any], np.ndarray]]:
    """Each answer: its part, its other columns, its token ids [R] int32."""
    for path, found in iter_parts(folder / "responses", RESPONSES, columns):
        answers = found["response_ids"].combine_chunks()
        others = found.drop_columns(["response_ids"]).to_pylist()
        for number, one in enumerate(others):
            yield path, one, answers[number].values.to_numpy()


def _languages(config: RunConfig, folder: Path, rows: Rows) -> dict[str, int]:
    most = config.datacard.language_prompts
    if not most:
        return {}
    if not can_detect():
        rows.notes.append("languages: not measured, as the detector is not installed (pip install 'hydra-heads[datacard]')")
        return {}

    def texts() -> Iterator[str]:
        left = most
        for _, found in iter_parts(folder / "prompts", PROMPTS, ["prompt", "messages"]):
            for one in found.slice(0, left).to_pylist():
                yield text_of(one["prompt"], one["messages"])
            left -= min(left, len(found))

    return languages_of(texts())
