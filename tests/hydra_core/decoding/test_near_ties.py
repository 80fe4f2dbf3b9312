"""When two answers count as equal: the verdicts, and how large a gap rounding may decide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import compare, naive_generate
from hydra_core.decoding.near_ties import (
    DEVIATIONS,
    FP32_TIE,
    TIE_STEPS,
    allowed_gap,
    bf16_step,
    judge,
    observed_rounding,
)
from hydra_core.sampling import Request

PROMPT = (5, 6, 7)


def logits(*values: float, rest: float = -4.0, size: int = 400) -> torch.Tensor:
    """[size] float64: `values`, then numbers around `rest`."""
    others = rest + torch.randn(size - len(values), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat((torch.tensor(values, dtype=torch.float64), others))


def noise(deviation: float, size: int = 400) -> torch.Tensor:
    made = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return made * (deviation / float(made.square().mean().sqrt()))


def test_verdicts(tiny_base: Base) -> None:
    answer = naive_generate(tiny_base, Request("x", PROMPT, 12, stop_ids=())).token_ids
    assert compare(tiny_base, PROMPT, answer, answer).verdict == "identical"
    wrong = (*answer[:4], (answer[4] + 1) % 256, *answer[5:])
    found = compare(tiny_base, PROMPT, answer, wrong)
    assert (found.verdict, found.index, found.allowed) == ("different", 4, FP32_TIE)
    assert found.gap is not None and found.gap > 1e-4
    assert compare(tiny_base, PROMPT, answer, answer[:6]).verdict == "different"


def test_bf16_step() -> None:
    assert bf16_step(1.0) == 2**-7 and bf16_step(-20.0) == 2**-3 and bf16_step(0.3) == 2**-9


@pytest.mark.parametrize("allowed", [FP32_TIE, 2.0**-5, 0.5])
def test_a_gap_at_just_under_and_over_the_bound(allowed: float) -> None:
    for gap, verdict in ((allowed, "different"), (allowed * (1 - 1e-9), "near-tie"), (allowed * (1 + 1e-9), "different")):
        for pair in ((0, 1), (1, 0)):
            found = judge(logits(gap, 0.0), pair, allowed)
            assert found[0] == verdict and found[1] == pytest.approx(gap, abs=1e-12)


def test_a_tie_far_below_the_top_is_none() -> None:
    """Two equal logits that neither way of computing would choose."""
    assert judge(logits(9.0, 5.0, 5.0), (1, 2), 0.5)[0] == "different"
    assert judge(logits(5.2, 5.0, 5.1), (1, 2), 0.5)[0] == "near-tie"
    assert judge(logits(5.5, 5.0, 5.4), (1, 2), 0.5)[0] == "different"  # one of them is a whole bound below the top


@pytest.mark.parametrize("weight_format", list(TIE_STEPS))
def test_the_bound_is_the_rounding_that_is_observed(weight_format: str) -> None:
    steps = TIE_STEPS[weight_format]
    exact, pair = logits(20.0, 19.9), (0, 1)
    step = bf16_step(20.0)
    quiet = allowed_gap(exact, [exact + noise(0.01)], pair, steps)
    assert quiet == pytest.approx(step + DEVIATIONS * 0.01, rel=0.02)
    assert allowed_gap(exact, [exact], pair, steps) == pytest.approx(step)
    assert allowed_gap(exact, [exact, exact + noise(0.01)], pair, steps) == quiet  # the least exact way counts
    loud = allowed_gap(exact, [exact + noise(3.0)], pair, steps)
    assert loud == steps * step  # but never more than some steps


def test_a_wrong_scale_is_no_rounding() -> None:
    """Logits that are 5 % too large, or all shifted: a gap of 0.4 at 20 was four steps of bf16 and passed as a near-tie."""
    exact = logits(20.0, 19.6)
    for wrong in (exact * 1.05, exact * 0.5, exact + 3.0, exact * 1.05 + noise(0.01)):
        assert observed_rounding(exact, wrong) < 0.012
        assert judge(exact, (0, 1), allowed_gap(exact, [wrong], (0, 1), TIE_STEPS["bf16"]))[0] == "different"
    assert judge(exact, (0, 1), TIE_STEPS["bf16"] * bf16_step(20.0))[0] == "near-tie"  # what the fixed bound alone says


@pytest.fixture(scope="module")
def pair(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Base, Base]]:
    """A base in bf16, and its weights in float64."""
    cache = tmp_path_factory.mktemp("cache")
    yield tuple(load_base(str(tiny_base_dir), dtype="bf16", cache=cache, widen=widen) for widen in (False, True))  # type: ignore[misc]


def test_a_base_is_judged_by_its_own_rounding(pair: tuple[Base, Base]) -> None:
    """The bound depends on the position, and a token that the base would never choose is different under any."""
    base, exact = pair
    answer = naive_generate(base, Request("x", PROMPT, 10, stop_ids=())).token_ids
    allowed = set()
    for index in range(1, 10):
        scores = exact.logits(exact.hidden_states([[*PROMPT, *answer[:index]]])[0][-1])
        worst = int(scores.argmin())
        found = compare(base, PROMPT, answer, (*answer[:index], worst), exact)
        assert found.index == index and found.verdict == "different" and found.gap is not None and found.allowed is not None
        assert found.gap == pytest.approx(float(scores[answer[index]] - scores[worst]), rel=1e-6)
        size = max(abs(float(scores[token])) for token in (answer[index], worst))
        assert bf16_step(size) < found.allowed <= TIE_STEPS["bf16"] * bf16_step(size)
        allowed.add(found.allowed)
    assert len(allowed) > 1


def test_a_base_that_cannot_be_computed_exactly_is_judged_by_itself(pair: tuple[Base, Base]) -> None:
    """As a quantised one: its own logits decide, and its own two ways of computing them say what rounding is."""
    base, exact = pair
    answer = naive_generate(base, Request("x", PROMPT, 6, stop_ids=())).token_ids
    own = base.logits(base.hidden_states([[*PROMPT, *answer[:3]]])[0][-1])
    other = (*answer[:3], int(own.argmin()))
    found = compare(base, PROMPT, answer, other)
    assert found.verdict == "different" and found.gap == pytest.approx(float(own[answer[3]] - own.min()))
    assert found.gap != compare(base, PROMPT, answer, other, exact).gap
    assert compare(base, PROMPT, answer, answer).verdict == "identical"
