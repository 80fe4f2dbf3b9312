"""Whatever happens to a running batch, every answer is the naive loop's: random trees, prompts, limits, arrivals,
stops, settings and cancellations, found by hypothesis."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from hydra_core.base import Base
from hydra_core.decoding import Engine, Result, naive_generate
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.sampling import Request
from hydra_core.tree import Tree, TreeSet
from hydra_core.tree.costs import StepCosts
from tests.trained import overfit_heads, random_prompts

KINDS = ("medusa", "hydra", "hydra++")
SETTINGS: tuple[dict[str, Any], ...] = (
    {}, {}, {"temperature": 0.8}, {"temperature": 1.1, "top_p": 0.9, "top_k": 30}, {"repetition_penalty": 1.3},
    {"temperature": 1.0, "frequency_penalty": 0.5, "min_p": 0.05}, {"temperature": 1.0, "choice": 2}, {"stop": ("a", "Z")})


@pytest.fixture(scope="module")
def heads(tiny_base: Base) -> dict[str, HeadDrafter]:
    return {kind: overfit_heads(tiny_base, kind, random_prompts(6, seed=1)) for kind in KINDS}


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any closed set of rank paths no deeper than the three heads."""
    paths: list[tuple[int, ...]] = []
    for _ in range(draw(st.integers(0, 7))):
        parent = draw(st.sampled_from([(), *(path for path in paths if len(path) < 3)]))
        child = (*parent, draw(st.integers(0, 4)))
        if child not in paths:
            paths.append(child)
    return Tree(tuple(paths))


@st.composite
def adaptive(draw: st.DrawFn, heads: dict[str, HeadDrafter]) -> AdaptiveDrafter:
    """Any heads, any settings, and prices at which much, little or nothing pays."""
    price = draw(st.sampled_from((0.0, 0.02, 0.3, 5.0)))
    costs = StepCosts({1: {1: 1.0, 24: 1.0 + 23 * price}, 4: {1: 1.2, 24: 1.2 + 80 * price}},
                      {1: {0: 0.01, 3: draw(st.sampled_from((0.02, 0.5)))}})
    ngram = draw(st.sampled_from((None, NgramDrafter(min_match=1), NgramDrafter(length=15))))
    return AdaptiveDrafter(heads[draw(st.sampled_from(KINDS))], ngram, costs)


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    known = random_prompts(6, seed=1) + random_prompts(10, seed=21, longest=70)
    known += [known[9][:20] + prompt for prompt in random_prompts(4, seed=22, longest=30)]
    made = []
    for number in range(draw(st.integers(1, 7))):
        stops = draw(st.sampled_from([None, (), (5, 17, 40, 99, 130, 200, 250)]))
        made.append(Request(f"r{number}", draw(st.sampled_from(known)), draw(st.integers(1, 14)), stop_ids=stops,
                            seed=draw(st.integers(0, 3)), **draw(st.sampled_from(SETTINGS))))
    return made


@lru_cache(maxsize=4096)
def reference(base: Base, request: Request) -> Result:
    return naive_generate(base, request, 80)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_running_batch(tiny_base: Base, heads: dict[str, HeadDrafter], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:  # prompts that take several steps, and share what they begin with
        for name, sizes in (("BUSY_TOKENS", (5, 30, 512)), ("IDLE_TOKENS", (20, 4096)), ("CHUNK", (7, 512)),
                            ("SHARED_TOKENS", (4, 32))):
            patch.setattr(f"hydra_core.decoding.scheduler.{name}", data.draw(st.sampled_from(sizes)))
        run_batch(tiny_base, heads, data)


def run_batch(tiny_base: Base, heads: dict[str, HeadDrafter], data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(("plain", "ngram", *KINDS, "adaptive", "adaptive")))
    batch = data.draw(st.integers(1, 4))
    drafter: Drafter | None = heads.get(kind) or (NgramDrafter(min_match=1) if kind == "ngram" else None)
    if kind == "adaptive":
        drafter = data.draw(adaptive(heads))
    chosen = TreeSet({1: data.draw(trees()), 3: data.draw(trees())}) if kind in KINDS else None
    engine = Engine(tiny_base, drafter, chosen, max_batch_size=batch, context_limit=80)
    waiting = data.draw(requests())
    everything, cancelled = {request.id: request for request in waiting}, set()
    streamed: dict[str, list[int]] = {name: [] for name in everything}
    results: dict[str, Result] = {}
    while waiting or engine.has_work:
        for _ in range(data.draw(st.integers(0, 2)) if engine.has_work else 1):
            if waiting:
                engine.add(waiting.pop())
        if data.draw(st.integers(0, 14)) == 0:
            victim = data.draw(st.sampled_from(sorted(everything)))
            engine.cancel(victim)
            cancelled.add(victim)
        for output in engine.step():
            streamed[output.id] += output.token_ids
            if output.result is not None:
                results[output.id] = output.result
    assert results.keys() == everything.keys()
    for name, result in results.items():
        wanted = reference(tiny_base, everything[name])
        assert tuple(streamed[name]) == result.token_ids
        if result.finish_reason == "cancelled":
            assert name in cancelled and result.token_ids == wanted.token_ids[:len(result.token_ids)]
        else:
            assert (result.token_ids, result.finish_reason) == (wanted.token_ids, wanted.finish_reason)
