"""Where the time of an engine goes: prompts, drafts, verification, acceptance, commit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class StepTimes:
    """Wall seconds by phase, and the `steps` (base forwards over drafts) they hold.

    `draft`: filling trees, prefix layer included; `verify`: the base's forward and logits; `accept`: choosing; `commit`:
    moving keys and values, and giving tokens on. `predicted`: what the drafter's cost table foretold for draft, verify,
    accept and commit together, 0 where it foretells nothing. On a GPU queued work counts where it is waited for.
    """

    steps: int = 0
    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    accept: float = 0.0
    commit: float = 0.0
    predicted: float = 0.0

    def __sub__(self, earlier: StepTimes) -> StepTimes:
        return StepTimes(*(getattr(self, part.name) - getattr(earlier, part.name) for part in fields(self)))

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


class Clock:
    """Running totals of one engine."""

    def __init__(self) -> None:
        self.totals = asdict(StepTimes())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block under `name`, one of the fields of `StepTimes`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.totals[name] += time.perf_counter() - began

    def count(self, predicted: float) -> None:
        """One more step, foretold to take so many seconds."""
        self.totals["steps"] += 1
        self.totals["predicted"] += predicted

    def read(self) -> StepTimes:
        return StepTimes(**self.totals)
