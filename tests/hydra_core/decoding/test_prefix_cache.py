"""What is kept of finished sequences: found by whole blocks, bounded, and the same tokens and drafts as if it were computed."""

from __future__ import annotations

import random
from itertools import chain

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hydra_core.base import Base
from hydra_core.base.kv_cache import KVCache
from hydra_core.decoding import Engine, Result, naive_generate
from hydra_core.decoding import prefix_cache as module
from hydra_core.decoding.memory import cache_bytes
from hydra_core.decoding.prefix_cache import BLOCK, PrefixCache
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, Drafter, DraftModel, NgramDrafter
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from tests.trained import overfit_heads, random_prompts

TREES = TreeSet({1: DraftTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0)))})
PROMPTS = random_prompts(6, seed=1)
NAMES = ("plain", "ngram", "medusa", "hydra", "hydra++", "adaptive", "draft model", "eagle3")
READS_NEXT = ("eagle3",)
"""What these keep of a token depends on the next one, so the last token of a prefix is computed again."""
ANSWER = 40


@pytest.fixture(scope="module")
def drafters(tiny_base: Base, tiny_draft: Base) -> dict[str, Drafter | None]:
    heads: dict[str, Drafter | None] = {kind: overfit_heads(tiny_base, kind, PROMPTS)
                                        for kind in ("medusa", "hydra", "hydra++", "eagle3")}
    adaptive = AdaptiveDrafter(heads["hydra++"], NgramDrafter(min_match=1))  # type: ignore[arg-type]
    others = {"plain": None, "ngram": NgramDrafter(min_match=1), "adaptive": adaptive, "draft model": DraftModel(tiny_draft)}
    return heads | others


def engine_of(base: Base, drafter: Drafter | None, prefix_cache: int = 4096, **changes: int) -> Engine:
    trees = TREES if isinstance(drafter, HeadDrafter) and not drafter.config.autoregressive else None
    return Engine(base, drafter, trees, prefix_cache=prefix_cache, **{"max_batch_size": 4, "draft_slots": 48} | changes)


def turns(engine: Engine, count: int = 3, **changes: object) -> list[list[Result]]:
    """Conversations over all prompts, `count` turns each: a turn is what was said before and a few tokens more."""
    said, found = list(PROMPTS), []
    for turn in range(count):
        results = engine.generate([Request(f"{turn}-{i}", prompt, ANSWER, stop_ids=(), **changes)  # type: ignore[arg-type]
                                   for i, prompt in enumerate(said)])
        said = [(*result.prompt_ids, *result.token_ids, 5 + turn, 9, 11) for result in results]
        found.append(results)
    return found


def equal_naive(base: Base, found: list[list[Result]], **changes: object) -> None:
    for results in found:
        for result in results:
            request = Request("x", result.prompt_ids, ANSWER, stop_ids=(), **changes)  # type: ignore[arg-type]
            assert result.token_ids == naive_generate(base, request).token_ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_later_turns_copy_what_was_said(tiny_base: Base, drafters: dict[str, Drafter | None], name: str,
                                        temperature: float) -> None:
    """All but the last block, and the new tokens are those of plain decoding, in a ragged batch of four rows."""
    engine = engine_of(tiny_base, drafters[name])
    found = turns(engine, temperature=temperature)
    equal_naive(tiny_base, found, temperature=temperature)
    assert all(result.cached_tokens == 0 for result in found[0])
    for before, after in zip(found[0] + found[1], found[1] + found[2], strict=True):
        known = len(before.prompt_ids) + len(before.token_ids) - 1  # the newest token of an answer is not in the cache
        assert after.cached_tokens >= known // BLOCK * BLOCK - (name in READS_NEXT) > 0


@pytest.mark.parametrize("name", ["hydra", "hydra++", "draft model", "eagle3"])
def test_drafts_are_those_of_prompts_that_are_computed(tiny_base: Base, drafters: dict[str, Drafter | None], name: str) -> None:
    """A prefix layer, a draft model and an EAGLE layer know a copied prefix as the base does: steps accept the same drafts."""
    kept, computed = (turns(engine_of(tiny_base, drafters[name], tokens, max_batch_size=1)) for tokens in (4096, 0))
    assert sum(result.cached_tokens for results in kept for result in results) > 0
    for one, other in zip(chain.from_iterable(kept), chain.from_iterable(computed), strict=True):
        assert other.cached_tokens == 0
        assert (one.token_ids, one.steps, one.accepted_lengths) == (other.token_ids, other.steps, other.accepted_lengths)
    assert sum(result.accepted for result in kept[0]) > 0


def test_what_the_prefix_layer_reads_is_what_it_would_compute(tiny_base: Base, drafters: dict[str, Drafter | None]) -> None:
    features = []
    for tokens in (4096, 0):
        engine = engine_of(tiny_base, drafters["hydra++"], tokens, max_batch_size=1)
        (first,) = engine.generate([Request("a", PROMPTS[0], ANSWER, stop_ids=())])
        engine.add(Request("b", (*PROMPTS[0], *first.token_ids, 7), ANSWER, stop_ids=()))
        engine.step()
        features.append(engine.proposer.features[0].clone())  # type: ignore[attr-defined]
    torch.testing.assert_close(features[0], features[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded_and_old_ones_go(tiny_base: Base, drafters: dict[str, Drafter | None], name: str) -> None:
    engine = engine_of(tiny_base, drafters[name], 8 * BLOCK + 3)
    assert engine.prefixes is not None and engine.prefixes.blocks == 8
    places = [pool.keys.data_ptr() for pool in engine.prefixes.pools]
    found = turns(engine)
    equal_naive(tiny_base, found)
    assert engine.prefixes.tokens == 8 * BLOCK and [pool.keys.data_ptr() for pool in engine.prefixes.pools] == places
    drafter = drafters[name]
    more = cache_bytes(tiny_base, drafter, 4, 100, 8 * BLOCK) - cache_bytes(tiny_base, drafter, 4, 100)
    assert more == sum(pool.nbytes for pool in engine.prefixes.pools)


def test_a_prompt_of_the_same_words_is_known_but_for_its_last_token(tiny_base: Base) -> None:
    prompt = tuple(range(10, 10 + 2 * BLOCK))
    engine = engine_of(tiny_base, None)
    (first,) = engine.generate([Request("a", prompt, 5, stop_ids=())])
    for name, asked, cached in (("b", prompt, BLOCK), ("c", (*prompt, first.token_ids[0]), 2 * BLOCK), ("d", prompt[1:], 0),
                                ("e", (*prompt[:BLOCK], 9, *prompt[BLOCK:]), BLOCK), ("f", prompt[:BLOCK], 0)):
        (found,) = engine.generate([Request(name, asked, 5, stop_ids=())])
        assert found.cached_tokens == cached, name
        assert found.token_ids == naive_generate(tiny_base, Request("x", asked, 5, stop_ids=())).token_ids
    engine.forget_prefixes()
    assert engine.generate([Request("g", prompt, 5)])[0].cached_tokens == 0


def test_an_instruction_of_many_requests_is_computed_once(tiny_base: Base, drafters: dict[str, Drafter | None]) -> None:
    system = tuple(random.Random(3).randrange(3, 200) for _ in range(4 * BLOCK))
    engine = engine_of(tiny_base, drafters["hydra++"], max_batch_size=1)
    results = engine.generate([Request(f"r{i}", (*system, *prompt), 12, stop_ids=()) for i, prompt in enumerate(PROMPTS)])
    assert [result.cached_tokens for result in results] == [0] + [4 * BLOCK] * (len(PROMPTS) - 1)
    for result in results:
        assert result.token_ids == naive_generate(tiny_base, Request("x", result.prompt_ids, 12, stop_ids=())).token_ids


def test_a_cancelled_answer_is_known_as_far_as_it_came(tiny_base: Base, drafters: dict[str, Drafter | None]) -> None:
    engine = engine_of(tiny_base, drafters["adaptive"])
    engine.add(Request("a", PROMPTS[0], 200, stop_ids=()))
    said: list[int] = []
    while len(said) < 2 * BLOCK:
        said += [token for output in engine.step() for token in output.token_ids]
    engine.cancel("a")
    engine.step()
    (after,) = engine.generate([Request("b", (*PROMPTS[0], *said), ANSWER, stop_ids=())])
    assert after.cached_tokens >= (len(PROMPTS[0]) + len(said) - 1) // BLOCK * BLOCK
    assert after.token_ids == naive_generate(tiny_base, Request("x", after.prompt_ids, ANSWER, stop_ids=())).token_ids


def test_an_answer_that_a_stop_cut_short(tiny_base: Base, drafters: dict[str, Drafter | None]) -> None:
    """The cache holds drafts beyond the end: they are no part of what is known."""
    engine = engine_of(tiny_base, drafters["hydra"], max_batch_size=1)
    for prompt in PROMPTS:
        whole = naive_generate(tiny_base, Request("x", prompt, ANSWER, stop_ids=())).token_ids
        (cut,) = engine.generate([Request("a", prompt, ANSWER, stop_ids=(whole[7],))])
        said = (*prompt, *cut.token_ids, *(3 + i % 7 for i in range(2 * BLOCK)))
        (after,) = engine.generate([Request("b", said, ANSWER, stop_ids=())])
        assert after.cached_tokens <= len(prompt) + len(cut.token_ids) - 1
        assert after.token_ids == naive_generate(tiny_base, Request("x", said, ANSWER, stop_ids=())).token_ids


def test_hidden_states_that_are_asked_for_are_computed(tiny_base: Base) -> None:
    engine = engine_of(tiny_base, None)
    engine.generate([Request("a", PROMPTS[0], ANSWER, stop_ids=())])
    (found,) = engine.generate([Request("b", (*PROMPTS[0], 7) * 3, 5, hidden_states=True, stop_ids=())])
    assert found.cached_tokens == 0 and found.hidden is not None
    exact = tiny_base.hidden_states([found.prompt_ids + found.token_ids])[0]
    torch.testing.assert_close(found.hidden, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("before", "after", "stays"), [
    ("plain", "hydra", True), ("hydra", "ngram", True), ("hydra", "hydra++", False), ("hydra++", "plain", False),
    ("adaptive", "hydra++", False)])
def test_another_drafter(tiny_base: Base, drafters: dict[str, Drafter | None], before: str, after: str, stays: bool) -> None:
    """What is known of the base stays; a prefix layer has not read it."""
    engine = engine_of(tiny_base, drafters[before])
    engine.generate([Request("a", PROMPTS[0], ANSWER, stop_ids=())])
    base_pool = engine.prefixes.pools[0] if engine.prefixes else None
    new = drafters[after]
    engine.add(Request("on the way", PROMPTS[1], ANSWER, stop_ids=()))
    engine.step()
    engine.change(engine.prepare(new, TREES if isinstance(new, HeadDrafter) else None))
    results = {}
    while engine.has_work:
        results.update({output.id: output.result for output in engine.step() if output.result})
    said = (*PROMPTS[0], *naive_generate(tiny_base, Request("x", PROMPTS[0], ANSWER, stop_ids=())).token_ids, 7)
    found = engine.generate([Request("b", said, ANSWER, stop_ids=())])
    assert (found[0].cached_tokens > 0) == stays and engine.prefixes is not None and engine.prefixes.pools[0] is base_pool
    for result in (*found, results["on the way"]):
        assert result is not None
        assert result.token_ids == naive_generate(tiny_base, Request("x", result.prompt_ids, ANSWER, stop_ids=())).token_ids


def test_after_an_exception_nothing_is_known(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny_base, None)
    engine.generate([Request("a", PROMPTS[0], ANSWER, stop_ids=())])
    monkeypatch.setattr(engine.prefixes, "keep", lambda row, tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate([Request("b", PROMPTS[1], 3)])
    monkeypatch.undo()
    engine.reset()
    (found,) = engine.generate([Request("c", (*PROMPTS[0], *PROMPTS[0], *PROMPTS[0]), 5, stop_ids=())])
    assert found.cached_tokens == 0


# -- the blocks themselves ---------------------------------------------------------------------------------------------

class Written:
    """A cache of one layer whose keys tell token and position, and the prefix cache over it."""

    def __init__(self, tokens: int) -> None:
        self.cache = KVCache(2, 3, 64, 1, 2, torch.float32)
        self.kept = PrefixCache(tokens, [self.cache])

    def keep(self, row: int, text: tuple[int, ...]) -> None:
        for place, token in enumerate(text):
            self.cache.keys[:, row, place] = float(token + 100 * place)
            self.cache.values[:, row, place] = float(-token)
        self.kept.keep(row, text)

    def read(self, row: int, text: tuple[int, ...]) -> int:
        """How many tokens of `text` are known, after it is seen that they are copied whole."""
        blocks = self.kept.find(text)
        count = len(blocks) * module.BLOCK
        self.cache.keys[:, row] = self.cache.values[:, row] = 0.0
        self.kept.restore(blocks, row, count)
        for place, token in enumerate(text[:count]):
            assert (self.cache.keys[:, row, place] == token + 100 * place).all()
            assert (self.cache.values[:, row, place] == -token).all()
        assert (self.cache.keys[:, row, count:] == 0).all() and int(self.cache.lengths[row]) == count
        return count


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_texts_are_found_as_they_were_kept(data: st.DataObject) -> None:
    """Texts with common beginnings, more of them than fit: what is found is whole, the newest text always, never too much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 4)
        capacity = data.draw(st.integers(0, 12))
        written = Written(4 * capacity + data.draw(st.integers(0, 3)))
        token = st.integers(1, 2)
        for _ in range(data.draw(st.integers(1, 12))):
            text = tuple(data.draw(st.lists(token, min_size=1, max_size=40)))
            if data.draw(st.booleans()):
                written.keep(data.draw(st.integers(0, 2)), text)
                known = min(len(text) // 4, capacity) * 4
                assert written.read(1, (*text, 1)) == known
            else:
                assert written.read(2, text) <= len(text) - 1
            assert written.kept.tokens <= 4 * capacity
            kept = written.kept
            assert len(kept._children) == len(kept._keys) and len(kept._free) + len(kept._keys) == capacity
            assert all(before in kept._keys for before, _ in kept._children if before != module.ROOT)


def test_what_is_used_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    written = Written(4 * 4)
    written.keep(0, (1,) * 8)
    written.keep(0, (2,) * 8)
    assert written.read(1, (1,) * 9) == 8  # used again
    written.keep(0, (3,) * 4)
    assert (written.read(1, (1,) * 9), written.read(1, (2,) * 9), written.read(1, (3,) * 5)) == (8, 4, 4)
