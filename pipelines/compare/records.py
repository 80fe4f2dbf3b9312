"""What a comparison holds: the records between the builder, which reads MLflow, and the renderers, which read nothing.

In every record with one value for each run the values stand in the order of `Comparison.runs`; None: that run has none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

Interval = tuple[float, float]
"""A 95 % interval: its lower and its upper end."""


@dataclass(frozen=True)
class ComparedRun:
    """One of the runs that are compared.

    `label`: a name that no other run of the comparison has; `run_ids`: of the runs of the stage that is compared, several where
    a stage has one for each drafter; `hardware`: the machine, None where it was not recorded; `machine`: what two runs on
    machines that are alike have in common; `started`: seconds since 1970; `commit`: of the
    code, its first digits, and a `+` where the code had been changed since.
    """

    label: str
    name: str
    run_ids: tuple[str, ...]
    parent_id: str | None
    hardware: str | None
    machine: str | None
    started: float
    commit: str | None


@dataclass(frozen=True)
class SettingRow:
    """A setting that is not the same in all runs. `stages`: those whose runs recorded these values."""

    stages: tuple[str, ...]
    name: str
    values: tuple[str | None, ...]


@dataclass(frozen=True)
class CategoryResult:
    """One contender on the questions of one category."""

    tokens_per_step: float | None
    speed_vs_plain: float | None
    interval: Interval | None


@dataclass(frozen=True)
class MethodResult:
    """What one bench measured of one contender.

    `interval`: of `speed_vs_plain`, over resampled questions; `identical`: share of answers that are those of plain decoding;
    `accepted`: share of steps that accepted at least 1, 2, ... drafts.
    """

    tokens_per_step: float | None = None
    speed_vs_plain: float | None = None
    interval: Interval | None = None
    speed_vs_transformers: float | None = None
    tokens_per_second: float | None = None
    questions: int | None = None
    identical: float | None = None
    accepted: tuple[float, ...] = ()
    categories: Mapping[str, CategoryResult] | None = None


@dataclass(frozen=True)
class MethodRow:
    """A contender, and what each bench measured of it."""

    method: str
    results: tuple[MethodResult | None, ...]


@dataclass(frozen=True)
class PairedResult:
    """The second run against the first on the questions that both decoded.

    `ratio`: of the second to the first in `quantity`; `p`: of Wilcoxon's signed-rank test over questions, None for too few of
    them; `verdict`: what may be said.
    """

    method: str
    quantity: str
    first: str
    second: str
    questions: int
    ratio: float
    interval: Interval
    p: float | None
    verdict: str


@dataclass(frozen=True)
class Curve:
    """One training. Point i of `loss` is a mean over the steps up to `tokens[i]` since point i - 1.

    `tokens`: positions that the first head has learned from so far; `device_seconds`: seconds times workers; `held_out`:
    (tokens, device-seconds, tokens per step on held-out rows) of each validation.
    """

    run: str
    drafter: str
    tokens: tuple[int, ...]
    device_seconds: tuple[float, ...]
    loss: tuple[float, ...]
    held_out: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class FigureTable:
    """Figures of other stages than `bench`: (name, a number or a text for each run)."""

    title: str
    rows: tuple[tuple[str, tuple[float | str | None, ...]], ...]


@dataclass(frozen=True)
class Cost:
    """What one stage of one run took; None: not recorded. `seconds`: of wall time; `tokens`: made, learned from or answered."""

    run: str
    stage: str
    hardware: str | None
    seconds: float | None
    device_seconds: float | None
    cpu_seconds: float | None
    gpu_seconds: float | None
    tokens: int | None
    kwh: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that is shown of several runs of one stage. `notes`: what a reader must know before believing a figure."""

    stage: str
    headline: str
    runs: tuple[ComparedRun, ...]
    notes: tuple[str, ...]
    settings: tuple[SettingRow, ...]
    methods: tuple[MethodRow, ...]
    pairs: tuple[PairedResult, ...]
    curves: tuple[Curve, ...]
    figures: tuple[FigureTable, ...]
    costs: tuple[Cost, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(run.label for run in self.runs)

    @property
    def title(self) -> str:
        *first, last = self.labels
        return f"Comparison of {', '.join(first)} and {last}"

    def to_json(self) -> str:
        """All of it, as JSON with the names of the fields."""
        return json.dumps(asdict(self), indent=1)
