"""A variant as the configuration of a training, the rows and steps of that, and the figures of its trainings in one."""

from __future__ import annotations

import math
import statistics
from typing import Any

from pipelines.ablate.results import Measured
from pipelines.config import RunConfig, TrainSection, Variant
from pipelines.config.ablate import folder_name
from pipelines.distill.stage import answered, distilled
from pipelines.rows.parquet_parts import iter_parts
from pipelines.rows.schemas import FEATURES, RESPONSES


def variant_config(config: RunConfig, label: str, variant: Variant, seed: int) -> RunConfig:
    """The configuration of a run that trains `variant` alone, under the name `label`."""
    train = config.train.model_copy(update={
        "drafters": {label: variant.heads}, "start": {}, "only": None, "seed": seed, "share": variant.share or config.train.share,
        "epochs": variant.epochs or config.train.epochs})
    return config.model_copy(update={"train": train})


def training_name(variant: str, seed: int) -> str:
    """The name of a training, as a drafter and as a folder."""
    return f"{folder_name(variant)}.seed{seed}"


def training_ids(config: RunConfig) -> tuple[str, ...]:
    """Ids of all rows of this run's `distill` that heads may learn from."""
    online = config.train.features == "online"
    folder, contract = (answered(config)[0], RESPONSES) if online else (distilled(config)[0], FEATURES)
    found: list[str] = []
    for _, rows in iter_parts(folder, contract, ["id", "split"]):
        found += [one for one, split in zip(rows["id"].to_pylist(), rows["split"].to_pylist(), strict=True) if split == "train"]
    return tuple(found)


def steps_for(train: TrainSection, rows: int) -> int:
    """Optimizer steps of a training on so many rows, as `BatchOrder.total_steps` counts them."""
    steps = max(1, math.ceil(round(train.epochs * rows / train.rows_per_step, 9)))
    return min(steps, train.max_steps) if train.max_steps else steps


def summarise(figures: list[dict[str, Any]]) -> Measured:
    """Summarise the figures of one variant's trainings, one for each seed."""
    values = [one["tokens_per_step"] for one in figures]
    tops = [one["top1"] for one in figures]
    spread = T95[min(len(values), len(T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measured(len(values), statistics.fmean(values), spread, tuple(map(statistics.fmean, zip(*tops, strict=True))),
                    figures[0]["response_tokens"], figures[0]["steps"], statistics.fmean(one["seconds"] for one in figures))


T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % by degrees of freedom; with more than ten seeds the value for ten is used, which is a little large."""
