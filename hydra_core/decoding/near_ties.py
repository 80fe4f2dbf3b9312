"""When two answers count as equal: token for token, or up to a near-tie, which rounding may decide either way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hydra_core.base.model import Base

FP32_TIE = 1e-4
TIE_STEPS = {"bf16": 4, "int4": 8, "int4-lossy": 8}
"""Number of bf16 steps within which two logits are near-tied. In 4 bits, few and many rows are multiplied by different kernels,
which round weights differently: twice as many."""


@dataclass(frozen=True)
class Comparison:
    """`index`: position of the first difference, None without one; `gap`: difference of the two tokens' logits, recomputed in
    float64; `allowed`: the gap below which that is a near-tie."""

    verdict: Literal["identical", "near-tie", "different"]
    index: int | None = None
    gap: float | None = None
    allowed: float | None = None


def bf16_step(value: float) -> float:
    """Distance between neighbouring bf16 numbers at the size of `value` (8 bits of significand)."""
    return 2.0 ** (math.floor(math.log2(abs(value))) - 7) if value else 2.0 ** -133


@torch.inference_mode()
def compare(exact: Base, prompt_ids: Sequence[int], reference: Sequence[int], other: Sequence[int]) -> Comparison:
    """Compare two greedy answers to one prompt.

    `exact`: the same base computing in float64 (`load_base(..., widen=True)`). The weight format in its identity sets the
    tolerance: 1e-4 in fp32, else `TIE_STEPS` bf16 steps at the size of the logits.
    """
    if tuple(reference) == tuple(other):
        return Comparison("identical")
    length = min(len(reference), len(other))
    index = next((i for i in range(length) if reference[i] != other[i]), length)
    if index == length:  # one answer ends where the other continues: rounding does not do that
        return Comparison("different", index)
    hidden = exact.hidden_states([[*prompt_ids, *reference[:index]]])[0]
    logits = exact.logits(hidden[-1])
    pair = logits[[reference[index], other[index]]].double()
    gap = abs(float(pair[0] - pair[1]))
    size = float(pair.abs().max())
    kind = exact.identity.weight_format
    allowed = FP32_TIE if kind == "fp32" else TIE_STEPS[kind] * bf16_step(size)
    # near-tied with each other is not enough: both must be near-tied with the highest logit
    top = float(logits.max().double())
    near = gap < allowed and top - float(pair.min()) < allowed
    return Comparison("near-tie" if near else "different", index, gap, allowed)
