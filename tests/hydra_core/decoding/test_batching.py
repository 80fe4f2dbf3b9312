"""Sequences that join, end, share a prefix or are cancelled: effects on the running batch and on the proposer's state."""

from __future__ import annotations

import random

import pytest
import torch

from hydra_core.base import Base
from hydra_core.decoding import Engine, Result, naive_generate
from hydra_core.errors import InputError
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, NgramDrafter
from hydra_core.proposers.dynamic import DynamicTreeProposer
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from tests.trained import overfit_heads, random_heads, random_prompts

TREE = TreeSet({1: DraftTree(((0,), (1,), (0, 0), (0, 1)))})


@pytest.fixture(scope="module")
def heads(tiny_base: Base) -> HeadDrafter:
    return overfit_heads(tiny_base, "hydra++", random_prompts(6, seed=1))


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make prompts of a few dozen tokens take several steps and share prefixes."""
    for name, value in (("BUSY_TOKENS", 24), ("IDLE_TOKENS", 60), ("CHUNK", 20), ("SHARED_TOKENS", 8), ("SHORT_PROMPT", 8)):
        monkeypatch.setattr(f"hydra_core.decoding.scheduler.{name}", value)


def finish(engine: Engine) -> dict[str, Result]:
    results = {}
    for _ in range(2000):
        if not engine.has_work:
            return results
        results.update({output.id: output.result for output in engine.step() if output.result})
    raise AssertionError("the engine never comes to an end")


def test_a_prefill_batch_completes_when_its_longest_prompt_is_cancelled(tiny_base: Base, small_steps: None) -> None:
    """The longest is cancelled when the shorter prompts are in the cache: they decode, and the next request is prefilled."""
    for steps in range(1, 12):
        engine = Engine(tiny_base, max_batch_size=5)
        engine.add(Request("runs", (7, 8, 9), 60, stop_ids=()))
        engine.step()
        group = [Request(f"g{i}", tuple(range(3 + i, 3 + i + length)), 4, stop_ids=())
                 for i, length in enumerate((100, 60, 52))]
        late = Request("late", (5, 6), 4, stop_ids=())
        for request in (*group, late):
            engine.add(request)
        results = {}
        for _ in range(steps):
            results.update({output.id: output.result for output in engine.step() if output.result})
        engine.cancel("g0")
        results |= finish(engine)
        for request in (*group[1:], late):
            assert results[request.id].token_ids == naive_generate(tiny_base, request).token_ids


def test_cancelling_frees_a_row_at_once(tiny_base: Base, heads: HeadDrafter) -> None:
    engine = Engine(tiny_base, heads, TREE, max_batch_size=2)
    for name in ("a", "b", "c"):
        engine.add(Request(name, (7, 8, 9), 50, stop_ids=()))
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    engine.cancel("a")
    ended = [output.id for output in engine.step() if output.result]
    assert ended == ["a"] and (engine.running, engine.waiting) == (2, 0) and set(engine.batch.samplers) == {"b", "c"}


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_what_the_drafter_remembers_survives_everything(tiny_base: Base, heads: HeadDrafter, small_steps: None, kind: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, copied prefixes, moved rows, cancellations, and steps drafted without heads: the features of each sequence equal
    the teacher-forced ones.

    Wrong features would not change a token; only acceptance would suffer.
    """
    dice, coin = random.Random(3), random.Random(4)
    used = []
    monkeypatch.setattr(DynamicTreeProposer, "_heads_pay", lambda *_: used.append(coin.random() < 0.3) or used[-1])
    common = tuple(range(3, 40))
    prompts = {f"r{i}": (common + (50 + i,) * dice.randint(1, 30)) if i % 2 else tuple(
        dice.randrange(3, 259) for _ in range(dice.randint(1, 60))) for i in range(24)}
    engine = Engine(tiny_base, heads if kind == "fixed" else AdaptiveDrafter(heads, NgramDrafter(min_match=1)), TREE,
                    max_batch_size=4)
    waiting = [Request(name, prompt, dice.randint(3, 20), stop_ids=()) for name, prompt in prompts.items()]
    tokens = {name: list(prompt) for name, prompt in prompts.items()}
    compared, copied = 0, 0
    while waiting or engine.has_work:
        if waiting and dice.random() < 0.6:
            engine.add(waiting.pop(0))
        if dice.random() < 0.1:
            engine.cancel(dice.choice(sorted(tokens)))
        for output in engine.step():
            tokens[output.id] += output.token_ids
        copied += sum(prompt.prefix_length for prompt in engine.scheduler.prefill.prompts) if engine.scheduler.prefill else 0
        if kind == "adaptive" and coin.random() < 0.7:
            continue  # reading the features catches up, as a draft with heads does: mostly leave them pending
        for index, sequence in enumerate(engine.scheduler.decoding):
            ids = tokens[sequence.request.id]
            hidden = tiny_base.hidden_states([ids])[0][None]
            mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
            wanted = heads.features(hidden, torch.arange(len(ids))[None], mask)[0, -2]  # the newest token is the root
            torch.testing.assert_close(engine.proposer.features[index], wanted, atol=1e-4, rtol=1e-4)  # type: ignore[attr-defined]
            compared += 1
    assert compared > (100 if kind == "fixed" else 30) and copied > 0
    assert kind == "fixed" or {True, False} <= set(used)


def test_prompts_of_all_lengths_go_in_with_little_padding(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_core.decoding.scheduler.SHORT_PROMPT", 4)
    dice = random.Random(4)
    requests = [Request(f"r{i}", tuple(dice.randrange(3, 259) for _ in range(dice.choice((3, 5, 40, 60, 180)))), 2,
                        stop_ids=()) for i in range(60)]
    engine, computed = Engine(tiny_base, max_batch_size=16), 0
    forward = tiny_base.forward

    def counting(ids: torch.Tensor, *args: object) -> torch.Tensor:
        nonlocal computed
        computed += ids.numel() if len(args) > 3 else 0  # prompts come with counts
        return forward(ids, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny_base, "forward", counting)
    engine.generate(requests)
    real = sum(len(request.prompt_ids) for request in requests)
    assert real <= computed <= 1.35 * real


def test_an_abandoned_stream_leaves_nothing_running(tiny_base: Base) -> None:
    engine = Engine(tiny_base, NgramDrafter(), max_batch_size=2)
    requests = [Request(str(i), (7, 8, 9 + i), 2 + 20 * i) for i in range(4)]
    stream = engine.stream(requests)
    assert next(stream).id == "0"
    stream.close()
    assert not engine.has_work and engine.running == engine.waiting == 0 and not engine.batch.samplers
    with pytest.raises(InputError, match="request bad: prompt: is empty"):
        list(engine.stream([requests[3], Request("bad", (), 3)]))
    assert not engine.has_work
    assert [result.token_ids for result in engine.generate(requests)] == [
        naive_generate(tiny_base, request).token_ids for request in requests]


def test_a_list_with_a_fault_is_refused_before_any_work(tiny_base: Base) -> None:
    engine = Engine(tiny_base, max_batch_size=2)
    same = [Request("one", (5, 6), 3), Request("one", (7,), 3)]
    with pytest.raises(InputError, match="request one: id: is used by more than one"):
        engine.generate(same)
    assert not engine.has_work


@pytest.mark.parametrize(("changes", "word"), [
    ({"seed": 1.5}, "seed: must be a whole number"), ({"top_k": 2.5}, "top_k"), ({"choice": 1.5}, "choice"),
    ({"max_new_tokens": 2.5}, "max_new_tokens"), ({"max_new_tokens": float("nan")}, "max_new_tokens"),
    ({"logprobs": True}, "logprobs"), ({"stop": "END"}, "stop: must be a list of strings"), ({"stop": None}, "stop"),
    ({"stop_ids": 5}, "stop_ids"), ({"temperature": None}, "temperature: must be a number"),
    ({"temperature": 1e-9}, "temperature: must be 0 "), ({"prompt_ids": "text"}, "prompt_ids"),
    ({"prompt_ids": (5, 6.0)}, "prompt_ids"), ({"top_p": "0.5"}, "top_p")])
def test_fields_of_the_wrong_kind(tiny_base: Base, changes: dict[str, object], word: str) -> None:
    """Each is refused, and a request that runs at the same time is not affected."""
    engine, good = Engine(tiny_base, max_batch_size=2), Request("good", [5, 6], 5)  # type: ignore[arg-type]
    engine.add(good)
    with pytest.raises(InputError, match=word):
        engine.add(Request(**{"id": "x", "prompt_ids": (5,), "max_new_tokens": 5, **changes}))  # type: ignore[arg-type]
    assert finish(engine)["good"].token_ids == naive_generate(tiny_base, good).token_ids


def test_limits_of_the_engine(tiny_base: Base) -> None:
    with pytest.raises(InputError, match="max_batch_size=0"):
        Engine(tiny_base, max_batch_size=0)
    with pytest.raises(InputError, match="context_limit=-1"):
        Engine(tiny_base, context_limit=-1)
    few = random_heads(tiny_base, "hydra", draft_vocab_size=4)
    with pytest.raises(InputError, match="rank 6 needs more than the 4 tokens"):
        Engine(tiny_base, few, TreeSet({1: DraftTree(((6,),))}))


def test_stop_strings_without_a_tokenizer(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_base, "tokenizer", None)
    request = Request("x", (5,), 5, stop=("END",))
    with pytest.raises(InputError, match="stop: the base has no tokenizer"):
        Engine(tiny_base).add(request)
    with pytest.raises(InputError, match="stop: the base has no tokenizer"):
        naive_generate(tiny_base, request)
