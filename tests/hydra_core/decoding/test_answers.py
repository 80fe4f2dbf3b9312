"""Finished answers as drafts: what a later request of the same engine gains, what never changes, and when they are forgotten."""

from __future__ import annotations

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine, Result, naive_generate
from hydra_core.proposers import AdaptiveDrafter, NgramDrafter, SuffixDrafter
from hydra_core.sampling import Request
from hydra_core.tree.costs import StepCosts
from tests.trained import random_prompts

FREE = StepCosts({1: {1: 1.0, 48: 1.0}, 8: {1: 1.0, 48: 1.0}}, {1: {0: 0.0}})
"""Nodes cost nothing, so that all candidates are verified."""
PROMPTS = random_prompts(4, seed=6)


def engine_of(base: Base, max_batch_size: int = 1, max_tokens: int = 5000, ngram: NgramDrafter | None = None) -> Engine:
    return Engine(base, AdaptiveDrafter(None, ngram, FREE, SuffixDrafter(max_tokens=max_tokens)), max_batch_size=max_batch_size)


def asked(engine: Engine, *names: str, **changes: object) -> list[Result]:
    """The same prompts under other names."""
    return engine.generate([Request(f"{name}{i}", prompt, 40, stop_ids=(), **changes)  # type: ignore[arg-type]
                            for name in names for i, prompt in enumerate(PROMPTS)])


def plain(base: Base, **changes: object) -> list[tuple[int, ...]]:
    return [naive_generate(base, Request("r", prompt, 40, stop_ids=(), **changes)).token_ids  # type: ignore[arg-type]
            for prompt in PROMPTS]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("ngram", [None, NgramDrafter()], ids=["alone", "with copied text"])
def test_a_second_like_request_is_accepted_more_than_the_first(tiny_base: Base, ngram: NgramDrafter | None,
                                                               temperature: float) -> None:
    """Nearly every step accepts a whole path then; the tokens are those of plain decoding both times."""
    engine = engine_of(tiny_base, ngram=ngram)
    first, second = (asked(engine, name, temperature=temperature, seed=3) for name in ("first", "second"))
    assert [result.token_ids for result in first] == plain(tiny_base, temperature=temperature, seed=3)
    assert [result.token_ids for result in second] == [result.token_ids for result in first]
    for before, after in zip(first, second, strict=True):
        assert after.accepted > before.accepted and after.steps <= 8 < before.steps
        assert after.accepted + after.steps >= 39 and after.drafted >= after.accepted  # the limit may cut the last step


def test_nothing_is_kept_where_sharing_is_off(tiny_base: Base) -> None:
    engine = engine_of(tiny_base, max_tokens=0)
    first, second = asked(engine, "first"), asked(engine, "second")
    assert engine.answers is None
    assert [(one.token_ids, one.steps) for one in first] == [(one.token_ids, one.steps) for one in second]


def test_a_sampled_request_gains_from_another_seed_without_taking_its_tokens(tiny_base: Base) -> None:
    engine = engine_of(tiny_base)
    for seed in range(4):
        found = asked(engine, f"s{seed}-", temperature=0.8, seed=seed)
        assert [result.token_ids for result in found] == plain(tiny_base, temperature=0.8, seed=seed)


def test_rows_of_a_batch_learn_from_those_that_ended(tiny_base: Base) -> None:
    """Ragged limits, and more requests than places."""
    engine = engine_of(tiny_base, max_batch_size=3)
    requests = [Request(f"{turn}-{i}", prompt, 9 + 7 * i + turn, stop_ids=())
                for turn in range(4) for i, prompt in enumerate(PROMPTS)]
    results = engine.generate(requests)
    for request, result in zip(requests, results, strict=True):
        assert result.token_ids == naive_generate(tiny_base, request).token_ids
    assert sum(one.steps for one in results[-4:]) < 0.5 * sum(one.steps for one in results[:4])


def test_a_cancelled_answer_is_kept_as_far_as_it_came(tiny_base: Base) -> None:
    engine = engine_of(tiny_base)
    engine.add(Request("gone", PROMPTS[0], 40, stop_ids=()))
    engine.add(Request("never began", PROMPTS[1], 40, stop_ids=()))
    while engine.scheduler.decoding == [] or len(engine.scheduler.decoding[0].tokens) < 20:
        engine.step()
    engine.cancel("gone")
    engine.cancel("never began")
    engine.step()
    assert engine.answers is not None and 20 <= len(engine.answers) < 60
    result = engine.generate([Request("again", PROMPTS[0], 40, stop_ids=())])[0]
    assert result.token_ids == plain(tiny_base)[0] and result.accepted >= 15


def test_answers_stay_with_the_engine_until_they_are_forgotten(tiny_base: Base) -> None:
    """Across another drafter and an engine that begins anew; another limit begins anew too; what is prepared alone changes
    nothing."""
    engine = engine_of(tiny_base)
    steps = [result.steps for result in asked(engine, "first")]
    kept, drafter = engine.answers, engine.drafting.drafter
    assert kept is not None and isinstance(drafter, AdaptiveDrafter)
    engine.change(engine.prepare(None))
    asked(engine, "plain")
    engine.change(engine.prepare(drafter))
    engine.reset()
    assert engine.answers is kept
    assert sum(result.steps for result in asked(engine, "second")) < 0.3 * sum(steps)
    engine.prepare(AdaptiveDrafter(None, None, FREE, SuffixDrafter(max_tokens=70)))
    assert engine.answers is kept and len(kept) > 0
    engine.forget_answers()
    assert len(kept) == 0
    assert asked(engine, "third")[0].steps > 0.5 * steps[0]
    small = engine.prepare(AdaptiveDrafter(None, None, FREE, SuffixDrafter(max_tokens=70)))
    engine.change(small)
    asked(engine, "fourth", "fifth")
    assert engine.answers is not kept and engine.answers is not None and len(engine.answers) == 70
