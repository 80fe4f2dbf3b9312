"""What an ablation measures of one variant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """A variant over its seeds: held-out tokens per step and top-1 of the first head; `spread`: half of a 95 % interval of the
    mean by Student's t, None for one seed; `response_tokens`: it learned from; `seconds`: of one training, in the mean."""

    seeds: int
    tokens_per_step: float
    spread: float | None
    top1: tuple[float, ...]
    response_tokens: int
    steps: int
    seconds: float
