"""When two answers count as equal: token for token, or up to a near-tie, which rounding may decide either way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hydra_core.base.formats import quantised_by
from hydra_core.base.model import Base
from hydra_core.tree.batch import chain

TIE_STEPS = {"bf16": 4, "int4": 8, "int4-lossy": 8, "fp32": 128}
"""Number of steps of the format that no near-tie exceeds. In 4 bits, few and many rows are multiplied by different kernels, which
round weights differently: twice as many. Sums of bf16 products are kept in fp32 and rounded once; in fp32 each addition rounds,
and a sum of K terms is off by about sqrt(K) steps: K is some thousand, and two ways of summing are compared."""
DEVIATIONS = 6
"""Standard deviations of a logit's rounding, as observed at a position, that two ways of computing two logits may differ by."""


@dataclass(frozen=True)
class Comparison:
    """`index`: position of the first difference, None without one; `gap`: difference of the two tokens' logits in float64;
    `allowed`: the gap below which that is a near-tie."""

    verdict: Literal["identical", "near-tie", "different"]
    index: int | None = None
    gap: float | None = None
    allowed: float | None = None


def step_of(kind: str, value: float) -> float:
    """Distance between neighbouring numbers of the weight format `kind` at the size of `value`: fp32's in fp32 (24 bits of
    significand), bf16's in all others (8 bits)."""
    if kind == "fp32":
        return 2.0 ** (math.floor(math.log2(abs(value))) - 23) if value else 2.0 ** -149
    return 2.0 ** (math.floor(math.log2(abs(value))) - 7) if value else 2.0 ** -133


def observed_rounding(exact: Tensor, rounded: Tensor) -> float:
    """Standard deviation of what rounding does to a logit: of `rounded` [V] from `exact` [V].

    What a wrong scale or an offset of all logits explains is no rounding, so it does not count.
    """
    exact, rounded = (logits.double() - logits.double().mean() for logits in (exact, rounded))
    size = float(exact.square().sum())
    slope = float((exact * rounded).sum()) / size if size else 0.0
    return float((rounded - slope * exact).square().mean().sqrt())


def allowed_gap(exact: Tensor, rounded: Sequence[Tensor], pair: tuple[int, int], kind: str) -> float:
    """The gap in logits below which the tokens of `pair` are near-tied.

    `exact`: [V], the logits of a position in float64; `rounded`: the same [V] as computed in the weight format, in one way or
    more; `kind`: the format. Its own step at the size of the logits, and `DEVIATIONS` times the largest rounding that is
    observed; never more than `TIE_STEPS` such steps.
    """
    step = step_of(kind, float(exact[list(pair)].double().abs().max()))
    return min(step + DEVIATIONS * max(observed_rounding(exact, found) for found in rounded), TIE_STEPS[kind] * step)


def judge(exact: Tensor, pair: tuple[int, int], allowed: float) -> tuple[Literal["near-tie", "different"], float]:
    """Whether the tokens of `pair` are near-tied in `exact` [V], and their gap. Both must be near-tied with the highest logit."""
    first, second = (float(exact[token].double()) for token in pair)
    gap = abs(first - second)
    near = gap < allowed and float(exact.double().max()) - min(first, second) < allowed
    return ("near-tie" if near else "different"), gap


@torch.inference_mode()
def compare(base: Base, prompt_ids: Sequence[int], reference: Sequence[int], other: Sequence[int],
            exact: Base | None = None) -> Comparison:
    """Compare two greedy answers of `base` to one prompt.

    `exact`: the same base computing in float64 (`load_base(..., widen=True)`); None for a base that cannot, or for which there is
    no memory. Such a one is judged by the logits of the position in float64, from its own hidden state after the whole text, and
    its own logits, computed with the whole text and token by token, say what rounding is. A base that is loaded quantised rounds
    as one in 4 bits, whatever the format of its other tensors is.
    """
    if tuple(reference) == tuple(other):
        return Comparison("identical")
    length = min(len(reference), len(other))
    index = next((i for i in range(length) if reference[i] != other[i]), length)
    if index == length:  # one answer ends where the other continues: rounding does not do that
        return Comparison("different", index)
    text = [*prompt_ids, *reference[:index]]
    hidden = base.hidden_states([text])[0][-1]
    own = base.logits(hidden)
    logits = base.vocabulary.head.in_float64(hidden) if exact is None else exact.logits(exact.hidden_states([text])[0][-1])
    pair, kind = (reference[index], other[index]), base.identity.weight_format
    allowed = allowed_gap(logits, (own, _by_a_step(base, text)), pair, "int4" if quantised_by(base.vocabulary.config) else kind)
    verdict, gap = judge(logits, pair, allowed)
    return Comparison(verdict, index, gap, allowed)


def _by_a_step(base: Base, text: list[int]) -> Tensor:
    """The logits [V] after `text` as plain decoding computes them: its last token in a step of its own."""
    cache = base.allocate(1, len(text))
    if len(text) > 1:
        base.prefill([text[:-1]], cache, (0, 1))
    return base.logits(base.forward(torch.tensor([text[-1:]], device=base.device), cache, (0, 1), chain(1))[0, -1])
