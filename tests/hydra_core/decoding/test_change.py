"""Another drafter while sequences decode, and an engine that is used again after an exception: the same tokens, one cache."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from hydra_core.base import Base
from hydra_core.decoding import Engine, Result, naive_generate
from hydra_core.decoding.memory import cache_bytes, check_memory, workspace_bytes
from hydra_core.errors import InputError
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, Drafter, DraftModel, Growth, NgramDrafter, SuffixDrafter
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet, default_trees
from tests.trained import overfit_heads, random_heads, random_prompts

TREES = TreeSet({1: DraftTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0)))})
PROMPTS = random_prompts(6, seed=1)
NAMES = ("plain", "ngram", "medusa", "hydra", "hydra++", "adaptive", "answers", "draft model", "eagle3")
KEEP_DRAFTING = {"ngram", "medusa", "hydra", "answers", "draft model"}
"""Those that need nothing of a sequence's past, or what can be made again."""


@pytest.fixture(scope="module")
def drafters(tiny_base: Base, tiny_draft: Base) -> dict[str, Drafter | None]:
    heads: dict[str, Drafter | None] = {kind: overfit_heads(tiny_base, kind, PROMPTS)
                                          for kind in ("medusa", "hydra", "hydra++", "eagle3")}
    adaptive = AdaptiveDrafter(heads["hydra++"], NgramDrafter(min_match=1))  # type: ignore[arg-type]
    answers = AdaptiveDrafter(None, None, suffix=SuffixDrafter(max_tokens=500))
    return heads | {"plain": None, "ngram": NgramDrafter(min_match=1), "adaptive": adaptive, "answers": answers,
                    "draft model": DraftModel(tiny_draft, Growth(floor=0))}


@pytest.fixture
def make(tiny_base: Base, drafters: dict[str, Drafter | None]) -> Callable[[str], Engine]:
    return lambda name: Engine(tiny_base, drafters[name], trees_for(drafters[name]), max_batch_size=4, draft_slots=48)


def trees_for(drafter: Drafter | None) -> TreeSet | None:
    return TREES if isinstance(drafter, HeadDrafter) and not drafter.config.autoregressive else None


def ragged(count: int) -> list[Request]:
    draw = random.Random(4)
    return [Request(f"r{i}", prompt, draw.randrange(5, 60), temperature=(0.0, 0.9)[i % 2], seed=i)
            for i, prompt in enumerate([*PROMPTS, *random_prompts(count - len(PROMPTS), seed=9)])]


def finish(engine: Engine, results: dict[str, Result]) -> None:
    while engine.has_work:
        results.update({output.id: output.result for output in engine.step() if output.result is not None})


def same(base: Base, results: dict[str, Result], requests: list[Request]) -> None:
    for request in requests:
        wanted = naive_generate(base, request)
        assert (results[request.id].token_ids, results[request.id].finish_reason) == (wanted.token_ids, wanted.finish_reason)


@pytest.mark.parametrize("after", NAMES)
@pytest.mark.parametrize("before", ["plain", "hydra++", "adaptive", "draft model"])
def test_tokens_are_those_of_plain_decoding_across_a_change(
        tiny_base: Base, make: Callable[[str], Engine], drafters: dict[str, Drafter | None], before: str, after: str) -> None:
    """Rows that decode, a prompt of which a part is computed, and requests that wait: a change at every third step."""
    engine, requests, results = make(before), ragged(12), dict[str, Result]()
    long = Request("long", tuple(range(3, 203)), 9)
    keys, steps = engine.cache.keys.data_ptr(), 0
    for request in [*requests[:6], long, *requests[6:]]:
        engine.add(request)
    while engine.has_work:
        if steps % 3 == 2 and steps < 30:
            name = (after, before)[steps % 2]
            engine.change(engine.prepare(drafters[name], trees_for(drafters[name])))
        results.update({output.id: output.result for output in engine.step() if output.result is not None})
        steps += 1
    same(tiny_base, results, [*requests, long])
    assert engine.cache.keys.data_ptr() == keys


@pytest.mark.parametrize("after", NAMES)
def test_who_is_drafted_for_after_a_change(make: Callable[[str], Engine], drafters: dict[str, Drafter | None],
                                           after: str) -> None:
    """Heads that read one hidden state go on with the next one; a prefix layer has not read the past of the sequences in the
    batch; later ones are drafted for by all."""
    engine, results = make("plain"), dict[str, Result]()
    for i, prompt in enumerate(PROMPTS[:3]):
        engine.add(Request(f"old{i}", prompt, 40, stop_ids=()))
    for _ in range(4):
        engine.step()
    engine.change(engine.prepare(drafters[after], trees_for(drafters[after])))
    engine.add(Request("new", PROMPTS[3], 40, stop_ids=()))
    finish(engine, results)
    drafted, accepted = (sum(getattr(results[f"old{i}"], name) for i in range(3)) for name in ("drafted", "accepted"))
    if after in ("ngram", "answers"):
        assert drafted > 0 and results["new"].drafted > 0
    elif after in KEEP_DRAFTING:
        assert accepted > 20 and all(results[f"old{i}"].steps < 39 for i in range(3)) and results["new"].accepted > 10
    else:
        assert drafted == 0 and (results["new"].accepted > 10) == (after != "plain")


def test_copied_text_is_looked_up_in_all_of_a_sequence(make: Callable[[str], Engine],
                                                       drafters: dict[str, Drafter | None]) -> None:
    engine = make("plain")
    for i, prompt in enumerate(PROMPTS[:3]):
        engine.add(Request(f"old{i}", prompt, 40, stop_ids=()))
    for _ in range(4):
        engine.step()
    drafting = engine.prepare(drafters["ngram"])
    engine.change(drafting)
    for row, sequence in engine.scheduler.rows:
        index = drafting.proposer.indexes[row]  # type: ignore[attr-defined]
        assert index.tokens == [*sequence.request.prompt_ids, *sequence.tokens] and len(sequence.tokens) > 3


def test_a_prefix_that_the_heads_have_not_read_is_not_copied(tiny_base: Base, make: Callable[[str], Engine],
                                                            drafters: dict[str, Drafter | None]) -> None:
    engine, results, prompt = make("plain"), dict[str, Result](), tuple(range(3, 103))
    engine.add(Request("old", prompt, 30, stop_ids=()))
    engine.step()
    engine.change(engine.prepare(drafters["hydra++"], TREES))
    engine.add(Request("new", (*prompt, 7), 30, stop_ids=()))
    engine.add(Request("newer", (*prompt, 8), 30, stop_ids=()))
    computed: list[int] = []
    forward = engine.base.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.base, "forward", lambda ids, *rest: (computed.append(ids.numel()), forward(ids, *rest))[1])
        for _ in range(3):
            results.update({output.id: output.result for output in engine.step() if output.result is not None})
    assert [size for size in computed if size > 40] == [101]  # `new` whole, `newer` its last token
    finish(engine, results)
    same(tiny_base, results, [Request("old", prompt, 30, stop_ids=()), Request("new", (*prompt, 7), 30, stop_ids=()),
                              Request("newer", (*prompt, 8), 30, stop_ids=())])


def test_the_cache_is_allocated_once(tiny_base: Base, make: Callable[[str], Engine], drafters: dict[str, Drafter | None],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a second one would not fit: only what heads keep themselves is new."""
    engine = make("plain")
    monkeypatch.setattr(tiny_base.decoder, "allocate", lambda *sizes: pytest.fail(f"a second cache of {sizes}"))
    heads = drafters["hydra++"]
    own = cache_bytes(tiny_base, heads, 4, engine.cache.slots) - engine.cache.nbytes
    assert heads.prefix.cache_bytes(4, engine.cache.slots + 64) < own < engine.cache.nbytes  # type: ignore[union-attr]
    assert engine.step_nodes == 1
    needed = own
    own += workspace_bytes(tiny_base, 4, engine.cache.slots, 6) - workspace_bytes(tiny_base, 4, engine.cache.slots, 1)
    monkeypatch.setattr("hydra_core.decoding.memory.free_bytes", lambda device: own)
    engine.change(engine.prepare(heads, TREES))
    with pytest.raises(InputError, match="lower one of the two"):
        check_memory(tiny_base, heads, 4, engine.cache.slots)
    monkeypatch.setattr("hydra_core.decoding.memory.free_bytes", lambda device: own - 1)
    engine.prepare(heads, TREES)  # steps of that many nodes have their memory now
    engine.change(engine.prepare())
    engine.prepare(heads, TREES)
    monkeypatch.setattr("hydra_core.decoding.memory.free_bytes", lambda device: needed - 1)
    with pytest.raises(InputError, match="lower one of the two"):
        engine.prepare(heads, TREES)
    engine.change(engine.prepare())
    engine.reset()
    assert engine.generate([Request("a", (5, 6), 5)])[0].token_ids


def test_trees_that_do_not_fit_are_refused(tiny_base: Base, drafters: dict[str, Drafter | None]) -> None:
    engine = Engine(tiny_base, drafters["hydra"], TREES)
    nodes = max(tree.size for tree in default_trees(3).trees.values())
    with pytest.raises(InputError, match=rf"trees: {nodes} nodes are more than the 6 that this engine has room for"):
        engine.prepare(drafters["hydra"])
    with pytest.raises(InputError, match="depth 3 needs more than the drafter's 2 heads"):
        engine.prepare(random_heads(tiny_base, "medusa", num_heads=2), TREES)


@pytest.mark.parametrize("name", ["plain", "hydra++", "adaptive"])
def test_an_engine_that_raised_decodes_again_after_a_reset(tiny_base: Base, make: Callable[[str], Engine], name: str,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises in the middle of a step, when the cache holds tokens that no answer has."""
    engine, requests = make(name), ragged(7)
    for request in requests:
        engine.add(request)
    for _ in range(3):
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.proposer, "commit", lambda *rest: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        engine.step()
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        engine.generate([Request("r0", (5, 6), 5)])  # not that the id is in use
    keys = engine.cache.keys.data_ptr()
    engine.reset()
    assert not engine.has_work and engine.cache.keys.data_ptr() == keys
    results = {result.id: result for result in engine.generate(requests)}
    same(tiny_base, results, requests)
