"""The light ends of `distill`'s flow of rows: what is to be done, read from parts, and what was done, written to parts.

Nothing here needs the base: Ray runs it in tasks beside the actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from hydra_core.storage import as_path
from pipelines.rows.parquet_parts import iter_rows, write_table
from pipelines.rows.row_ids import among, row_digests
from pipelines.rows.schemas import ERRORS, FEATURES, PROMPTS, RESPONSES, content_id
from pipelines.runtime.row_flow import Rows

TO_ANSWER, ANSWERED, SEEDS = "to answer", "answered", "seeds"
"""What an actor is given: response rows without their answer and `has_features`, response rows, numbers of candidates."""
TASKS = pa.schema([*RESPONSES, ("has_features", pa.bool_())])
WRITTEN = {"prompts": (PROMPTS, "prompt_id"), "errors/prompts": (ERRORS, "id"), "candidates": (PROMPTS, "source"),
           "responses": (RESPONSES, "id"), "features": (FEATURES, "id"), "errors/answers": (ERRORS, "id")}
"""Folder -> the contract of its parts and what tells rows apart."""
SOURCES = 64
"""Tables that parts are dealt out to, for as many tasks."""
READ_ROWS = 1024


def rows_of(name: str, rows: list[dict[str, Any]], **counts: int) -> Rows:
    """Rows for the folder `name`, by its contract."""
    return Rows(name, pa.Table.from_pylist(rows, schema=WRITTEN[name][0]), counts)


def parts_to_read(kind: str, parts: Sequence[Path]) -> list[pa.Table]:
    """A flow's source for `TaskReader`: the parts of `prompts/` as TO_ANSWER, those of `responses/` as ANSWERED."""
    return [pa.table({"kind": [kind] * len(dealt), "part": [str(path) for path in dealt]})
            for dealt in (parts[start::SOURCES] for start in range(min(SOURCES, len(parts))))]


@dataclass(frozen=True)
class TaskReader:
    """Reads parts and hands on what is not finished, in blocks. What is finished was found out before, so that a part that is
    read twice gives the same blocks.

    `base`: identity of the base; `limits`: further parts of an answer's id; `block_rows`: answers in one block, `feature_rows`:
    rows that stand and lack their hidden states; `responses`, `features`: digests of the ids that stand (`row_ids`);
    `held_out_only`: whether the other rows need no hidden states.
    """

    base: str
    limits: list[Any]
    temperatures: tuple[float, ...]
    seed: int
    block_rows: int
    feature_rows: int
    responses: np.ndarray
    features: np.ndarray
    held_out_only: bool

    def __call__(self, source: pa.Table) -> Iterator[Rows]:
        for item in source.to_pylist():
            prompts = item["kind"] == TO_ANSWER
            found = self._to_answer(as_path(item["part"])) if prompts else self._answered(as_path(item["part"]))
            yield from _blocks(item["kind"], found, self.block_rows if prompts else self.feature_rows)

    def _to_answer(self, part: Path) -> Iterator[pa.Table]:
        for prompts in iter_rows(part, PROMPTS, READ_ROWS):
            rows = [self._task(prompt, sample, temperature) for prompt in prompts.to_pylist()
                    for sample, temperature in enumerate(self.temperatures)]
            digests = row_digests(row["id"] for row in rows)
            # of answers that were lost since: the answers come out the same
            tasks = pa.Table.from_pylist([{**row, "has_features": bool(stored)} for row, stored in
                                          zip(rows, among(digests, self.features), strict=True)], schema=TASKS)
            yield tasks.filter(pa.array(~among(digests, self.responses)))

    def _task(self, prompt: dict[str, Any], sample: int, temperature: float) -> dict[str, Any]:
        """A response row without its answer. Its id is a digest of all that decides the answer."""
        seed = self.seed + int(content_id(prompt["prompt_id"], sample)[:8], 16)
        return {"id": content_id(prompt["prompt_id"], temperature, seed, sample, self.base, self.limits),
                "prompt_id": prompt["prompt_id"], "prompt_ids": prompt["prompt_ids"], "response_ids": None,
                "finish_reason": None, "temperature": temperature, "seed": seed, "source": prompt["source"],
                "split": prompt["split"], "base": self.base}

    def _answered(self, part: Path) -> Iterator[pa.Table]:
        for rows in iter_rows(part, RESPONSES, READ_ROWS):
            lacks = ~among(row_digests(rows["id"].to_pylist()), self.features)
            yield rows.filter(pa.array(lacks & wants_features(rows, self.held_out_only)))


def wants_features(rows: pa.Table, held_out_only: bool) -> np.ndarray:
    """Which of these responses have their hidden states stored: [n] bool."""
    return rows["split"].to_numpy() == "held_out" if held_out_only else np.ones(len(rows), bool)


def seeds_to_read(seeds: np.ndarray, block_rows: int) -> list[pa.Table]:
    """A flow's source for `read_seeds`."""
    return [pa.table({"index": seeds[start:start + block_rows]}) for start in range(0, len(seeds), block_rows)]


def read_seeds(source: pa.Table) -> Iterator[Rows]:
    """Numbers of candidates for self-made prompts, as they come."""
    yield Rows(SEEDS, source)


@dataclass(frozen=True)
class PartWriter:
    """Writes rows as a part of the folder that is their name in `folder`, or of the one that `elsewhere` has for it."""

    folder: Path
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    def __call__(self, rows: Rows) -> None:
        _, key = WRITTEN[rows.name]
        write_table(self.elsewhere.get(rows.name, self.folder / rows.name), rows.table, rows.table[key].to_pylist())


def _blocks(kind: str, tables: Iterator[pa.Table], size: int) -> Iterator[Rows]:
    """The same rows in tables of `size`, and what is left."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        while sum(map(len, held)) >= size:
            whole = pa.concat_tables(held)
            yield Rows(kind, whole.slice(0, size))
            held = [whole.slice(size)]
    if sum(map(len, held)):
        yield Rows(kind, pa.concat_tables(held))
