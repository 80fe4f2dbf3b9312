"""When two answers count as equal: the verdicts, and how large a gap rounding may decide."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import compare, naive_generate, near_ties
from hydra_core.decoding.near_ties import (
    DEVIATIONS,
    TIE_STEPS,
    Comparison,
    allowed_gap,
    judge,
    observed_rounding,
    step_of,
)
from hydra_core.sampling import Request
from hydra_core.tree.batch import chain

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
    assert (found.verdict, found.index) == ("different", 4)
    assert found.gap is not None and found.allowed is not None and found.gap > 1e-4 > found.allowed
    assert compare(tiny_base, PROMPT, answer, answer[:6]).verdict == "different"


@pytest.mark.parametrize("kind", list(TIE_STEPS))
def test_a_step_is_the_distance_of_two_numbers(kind: str) -> None:
    """Against torch's own numbers, on both sides of a power of two and at zero."""
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    for value in (1.0, -20.0, 0.3, 1.9, 2.0, 2.1, 16.0, 4000.0, 0.0):
        here = torch.tensor(abs(value)).to(dtype)
        assert step_of(kind, float(here)) == float(torch.nextafter(here, torch.tensor(torch.inf, dtype=dtype)).double() - here)
        assert step_of(kind, -float(here)) == step_of(kind, float(here))


@pytest.mark.parametrize("allowed", [1e-4, 2.0**-5, 0.5])
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
    exact, pair, kind = logits(20.0, 19.9), (0, 1), weight_format
    step = step_of(kind, 20.0)
    size = 0.08 * step
    quiet = allowed_gap(exact, [exact + noise(size)], pair, kind)
    assert quiet == pytest.approx(step + DEVIATIONS * size, rel=0.02)
    assert allowed_gap(exact, [exact], pair, kind) == pytest.approx(step)
    assert allowed_gap(exact, [exact, exact + noise(size)], pair, kind) == quiet  # the least exact way counts
    loud = allowed_gap(exact, [exact + noise(3.0)], pair, kind)
    assert loud == TIE_STEPS[kind] * step  # but never more than some steps


@pytest.mark.parametrize("weight_format", list(TIE_STEPS))
def test_larger_logits_have_larger_ties(weight_format: str) -> None:
    """Rounding is relative: at 64 times the size it is 64 times as large, in fp32 too, and so is what it may decide."""
    exact, rough = logits(20.0, 19.99), logits(20.0, 19.99) + noise(0.1 * step_of(weight_format, 20.0))
    for factor in (64.0, 1 / 64):
        assert allowed_gap(exact * factor, [rough * factor], (0, 1), weight_format) == pytest.approx(
            factor * allowed_gap(exact, [rough], (0, 1), weight_format), rel=1e-6)
    assert allowed_gap(logits(20.0, -80.0), [logits(20.0, -80.0)], (0, 1), weight_format) == pytest.approx(
        step_of(weight_format, 80.0))  # the larger of the two has the larger steps


def test_a_wrong_scale_is_no_rounding() -> None:
    """Logits that are 5 % too large, or all shifted: a gap of 0.4 at 20 was four steps of bf16 and passed as a near-tie."""
    exact = logits(20.0, 19.6)
    for wrong in (exact * 1.05, exact * 0.5, exact + 3.0, exact * 1.05 + noise(0.01)):
        assert observed_rounding(exact, wrong) < 0.012
        assert judge(exact, (0, 1), allowed_gap(exact, [wrong], (0, 1), "bf16"))[0] == "different"
    assert judge(exact, (0, 1), TIE_STEPS["bf16"] * step_of("bf16", 20.0))[0] == "near-tie"  # what the fixed bound alone says


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
        assert step_of("bf16", size) < found.allowed <= TIE_STEPS["bf16"] * step_of("bf16", size)
        allowed.add(found.allowed)
    assert len(allowed) > 1


def test_a_base_that_cannot_be_computed_exactly_is_judged_by_itself(pair: tuple[Base, Base]) -> None:
    """As a quantised one: the float64 logits of its own last position decide, and its own two ways of computing them say what
    rounding is."""
    base, exact = pair
    answer = naive_generate(base, Request("x", PROMPT, 6, stop_ids=())).token_ids
    hidden = base.hidden_states([[*PROMPT, *answer[:3]]])[0][-1]
    own, rounded = base.vocabulary.head.in_float64(hidden), base.logits(hidden)
    assert own.dtype == torch.float64 and 0 < float((own - rounded).abs().max()) <= step_of("bf16", float(own.abs().max()))
    other = (*answer[:3], int(own.argmin()))
    found = compare(base, PROMPT, answer, other)
    assert found.verdict == "different" and found.gap == pytest.approx(float(own[answer[3]] - own.min()), rel=1e-12)
    assert found.gap != compare(base, PROMPT, answer, other, exact).gap
    assert compare(base, PROMPT, answer, answer).verdict == "identical"


def test_both_ways_of_computing_say_what_rounding_is(pair: tuple[Base, Base], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole text at once, and its last token in a step of its own, as plain decoding does: the rougher of them counts."""
    base, exact = pair
    answer = naive_generate(base, Request("x", PROMPT, 6, stop_ids=())).token_ids
    text, other = [*PROMPT, *answer[:2]], (*answer[:2], (answer[2] + 1) % 256)
    scores = exact.logits(exact.hidden_states([text])[0][-1])
    whole = base.logits(base.hidden_states([text])[0][-1])
    cache = base.allocate(1, 16)
    base.prefill([text[:-1]], cache, (0, 1))
    step = base.logits(base.forward(torch.tensor([[text[-1]]]), cache, (0, 1), chain(1))[0, -1])
    both = (answer[2], other[2])
    assert compare(base, PROMPT, answer, other, exact).allowed == allowed_gap(scores, (whole, step), both, "bf16")
    monkeypatch.setattr(near_ties, "_by_a_step", lambda *_: scores)
    assert compare(base, PROMPT, answer, other, exact).allowed == allowed_gap(scores, (whole,), both, "bf16")
    monkeypatch.setattr(near_ties, "_by_a_step", lambda *_: scores + noise(9.0, len(scores)))
    allowed = compare(base, PROMPT, answer, other, exact).allowed
    assert allowed == TIE_STEPS["bf16"] * step_of("bf16", max(abs(float(scores[token])) for token in both))


def test_a_text_of_one_token_has_a_step_too(pair: tuple[Base, Base]) -> None:
    base, exact = pair
    scores = exact.logits(exact.hidden_states([[5]])[0][-1])
    own = base.logits(base.hidden_states([[5]])[0][-1])
    first, last = int(scores.argmax()), int(scores.argmin())
    found = compare(base, (5,), (first,), (last,), exact)
    assert (found.verdict, found.index) == ("different", 0)
    assert found.gap == pytest.approx(float(scores[first] - scores[last]), rel=1e-6)
    assert found.allowed == allowed_gap(scores, (own, own), (first, last), "bf16")


def test_a_quantised_base_rounds_as_one_in_4_bits(tiny_base: Base) -> None:
    """Also where its other tensors are in fp32, whose own bound its products would pass."""
    config = copy.deepcopy(tiny_base.vocabulary.config)
    config.quantization_config = {"quant_method": "awq"}
    base = Base(replace(tiny_base.vocabulary, config=config), tiny_base.decoder, tiny_base.tokenizer, tiny_base.context_limit,
                tiny_base.device)
    answer = naive_generate(base, Request("x", PROMPT, 6, stop_ids=())).token_ids
    other = (*answer[:3], (answer[3] + 1) % 256)
    scores = base.logits(base.hidden_states([[*PROMPT, *answer[:3]]])[0][-1])
    step = step_of("bf16", max(abs(float(scores[token])) for token in (answer[3], other[3])))
    allowed, plain = (compare(one, PROMPT, answer, other).allowed for one in (base, tiny_base))
    assert allowed is not None and plain is not None
    assert step <= allowed <= TIE_STEPS["int4"] * step and plain < 1e-3 * step


def test_an_answer_that_ends_early_is_different(tiny_base: Base) -> None:
    """Its index is where the other goes on, whichever of the two it is; nothing is computed, so there is no gap."""
    answer = naive_generate(tiny_base, Request("x", PROMPT, 6, stop_ids=())).token_ids
    for first, second in ((answer, answer[:4]), (answer[:4], answer)):
        found = compare(tiny_base, PROMPT, first, second)
        assert (found.verdict, found.index, found.gap, found.allowed) == ("different", 4, None, None)
    assert compare(tiny_base, PROMPT, list(answer), answer) == Comparison("identical")
