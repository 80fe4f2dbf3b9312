"""Time of an engine by phase: prompts, drafts, verification, acceptance, commit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from hydra_core.proposers.base import StepTimes


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
        """Count a step that was predicted to take `predicted` seconds."""
        self.totals["steps"] += 1
        self.totals["predicted"] += predicted

    def read(self) -> StepTimes:
        """The totals so far."""
        return StepTimes(**self.totals)
