"""The points of a learning curve: which trainings it takes, and what each has brought.

A point is a training of one drafter on a share of the rows with one seed, as the `train` stage makes it: a run of its own in
MLflow, continued where it was stopped, and not made again where it stands. All points are measured on the same held-out rows.
Each training fills the workers of `train.workers`, so the driver starts one after the other; Ray Tune would add a second queue
before the same room.

Of each training the heads of the best validation count, so that passes too many over a small share cost time and no tokens per
step (as in Hestness et al. 2017, where each size is trained to its best validation).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hydra_core.errors import InputError
from pipelines.ablate.variants import steps_for, variant_config
from pipelines.config import RunConfig, Variant
from pipelines.config.ablate import folder_name
from pipelines.rows.schemas import is_in_share
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.console import Progress, say
from pipelines.train.context import CURVE
from pipelines.train.stage import run_train

STAGE = "curve"
LONGEST_STEP = 50
"""Usual steps that a pause between two steps counts as, at most."""


@dataclass(frozen=True)
class Point:
    """One training. `share`: of the rows of `train.share`; `rows`: how many that are; `steps`: optimizer steps."""

    drafter: str
    share: float
    seed: int
    rows: int
    steps: int

    @property
    def label(self) -> str:
        """Its name as a drafter and as a folder."""
        return f"{folder_name(self.drafter)}.share{self.share:g}.seed{self.seed}"


@dataclass(frozen=True)
class Trained:
    """A point with what its training has brought. `seconds`: of its steps and validations; `response_tokens`: learned from."""

    point: Point
    tokens_per_step: float
    response_tokens: int
    seconds: float


def drafters_of(config: RunConfig) -> tuple[str, ...]:
    """The drafters of the curve. Raises InputError for one that is not configured."""
    if unknown := [name for name in config.curve.drafters if name not in config.train.drafters]:
        raise InputError(f"curve.drafters: {unknown[0]!r} is none of train.drafters: {', '.join(config.train.drafters)}")
    return config.curve.drafters or ((config.train.only,) if config.train.only else tuple(config.train.drafters))


def plan_points(config: RunConfig, ids: tuple[str, ...]) -> list[Point]:
    """Every training, smallest shares first. `ids`: of all training rows.

    Raises InputError for a share with less rows than one step takes, or with the same rows as another.
    """
    curve, train = config.curve, config.train
    rows = {share: sum(is_in_share(one, share * train.share) for one in ids) for share in sorted(curve.shares)}
    smallest = min(rows)
    if rows[smallest] < train.rows_per_step:
        raise InputError(f"curve.shares: the share {smallest:g} of {len(ids):,} training rows is {rows[smallest]:,} rows, fewer "
                         f"than the {train.rows_per_step} of one step (train.rows_per_step): distill more prompts or name larger "
                         "shares")
    if same := [share for share, other in zip(list(rows)[1:], rows, strict=False) if rows[share] == rows[other]]:
        raise InputError(f"curve.shares: the share {same[0]:g} of {len(ids):,} training rows holds the same rows as a smaller "
                         "one: name shares that are further apart")
    most = train.max_steps or math.inf
    passed = {share: int(min(max(steps_for(train, count), curve.least_steps), most)) for share, count in rows.items()}
    equal = max(passed.values())
    steps = {share: equal if curve.steps_per_share == "equal" else count for share, count in passed.items()}
    return [Point(drafter, share, seed, rows[share], steps[share])
            for share in rows for drafter in drafters_of(config) for seed in curve.seeds]


def point_config(config: RunConfig, point: Point) -> RunConfig:
    """The configuration of a run that trains `point` alone, on rows that a larger share has too, and validates it on the held-out
    rows of every other point."""
    epochs = math.ceil(point.steps * config.train.rows_per_step / point.rows)
    variant = Variant(heads=config.train.drafters[point.drafter], seeds=(point.seed,), share=point.share * config.train.share,
                      epochs=epochs)
    made = variant_config(config, point.label, variant, point.seed)
    held_out = config.train.seed if config.train.validation_seed is None else config.train.validation_seed
    return made.model_copy(update={"train": made.train.model_copy(update={
        "max_steps": point.steps, "validation_seed": held_out})})


def train_points(config: RunConfig, points: list[Point]) -> list[Trained]:
    """Train what is not trained yet; whatever `train` raises."""
    return list(_trained(config, points))


def _trained(config: RunConfig, points: list[Point]) -> Iterator[Trained]:
    with Progress(STAGE, "trainings", len(points)) as progress:
        for point in points:
            say(STAGE, f"{point.drafter}, {point.rows:,} rows, seed {point.seed}: {point.steps} steps")
            figures: dict[str, Any] = run_train(point_config(config, point)).figures[point.label]
            progress.advance()
            lines = (RunPaths.of(config).stage("train", point.label) / CURVE).read_text(encoding="utf-8").splitlines()
            yield Trained(point, figures["tokens_per_step"], figures["response_tokens"],
                          stepping_seconds([json.loads(line)["time"] for line in lines]))


def stepping_seconds(times: Sequence[float]) -> float:
    """Seconds of a training whose steps ended at `times`, without its start, and without the pause of one that was stopped and
    continued: a pause counts as `LONGEST_STEP` usual steps at most, which is more than a validation takes."""
    between = [max(later - earlier, 0.0) for earlier, later in pairwise(times)]
    if not between:
        return 0.0
    usual = statistics.median(between)
    return sum(min(one, LONGEST_STEP * usual) for one in between) + usual  # of the first step only the end is recorded
