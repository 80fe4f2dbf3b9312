"""What an ablation measures of one variant."""

from __future__ import annotations

from dataclasses import dataclass


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
