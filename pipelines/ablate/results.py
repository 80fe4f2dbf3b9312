"""What an ablation measures of one variant, and a search of one trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.ablate.trials import Trial


@dataclass(frozen=True)
class Measured:
    """Results of one variant over its seeds, on held-out rows.

    `tokens_per_step`, `top1` (by head) and `seconds` (of one training) are means over the seeds. `spread` is half of the 95 %
    interval of the mean of `tokens_per_step` (Student's t), None for one seed. `response_tokens`: number of answer tokens that
    the heads learned from.
    """

    seeds: int
    tokens_per_step: float
    spread: float | None
    top1: tuple[float, ...]
    response_tokens: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Tried:
    """A trial and what it has brought. `steps`: how many it has made; `stopped`: whether it was stopped before its last step."""

    trial: Trial
    tokens_per_step: float
    steps: int
    stopped: bool
    seconds: float

    def figures(self) -> dict[str, Any]:
        """As the report's JSON has it."""
        return {"label": self.trial.label, "values": self.trial.values, "tokens_per_step": self.tokens_per_step,
                "steps": self.steps, "stopped": self.stopped, "seconds": self.seconds}
