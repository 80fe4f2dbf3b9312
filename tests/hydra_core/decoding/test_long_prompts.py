"""A long prompt shares its steps with short ones: nobody waits for all of it, it is not kept out, and tokens stay the same."""

from __future__ import annotations

import random

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine, Result, naive_generate, scheduler
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.sampling import Request
from tests.trained import random_heads, random_prompts

CHUNK = 8
LONG = tuple(3 + i * 7 % 250 for i in range(200))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 200 tokens takes 25 steps."""
    for name in ("CHUNK", "BUSY_TOKENS", "IDLE_TOKENS"):
        monkeypatch.setattr(scheduler, name, CHUNK)
    monkeypatch.setattr(scheduler, "SHORT_PROMPT", 4)


def drafter_of(base: Base, name: str) -> Drafter | None:
    if name == "adaptive":
        return AdaptiveDrafter(random_heads(base, "hydra++"), NgramDrafter(min_match=1))
    return None if name == "plain" else random_heads(base, name)


def same(base: Base, results: dict[str, Result], requests: list[Request]) -> None:
    for request in requests:
        wanted = naive_generate(base, request)
        assert (results[request.id].token_ids, results[request.id].finish_reason) == (wanted.token_ids, wanted.finish_reason)


def ended(engine: Engine) -> dict[str, Result]:
    return {output.id: output.result for output in engine.step() if output.result is not None}


@pytest.mark.parametrize("name", ["plain", "hydra", "hydra++", "adaptive"])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_are_those_of_plain_decoding(tiny_base: Base, name: str, seed: int) -> None:
    """Long and short prompts, alone and sharing a beginning, of which some are cancelled, arrive while others decode; answers end
    early, at different steps."""
    draw, engine = random.Random(seed), Engine(tiny_base, drafter_of(tiny_base, name), max_batch_size=4)
    parked, results, requests, cancelled = 0, dict[str, Result](), list[Request](), set[str]()
    shorts = random_prompts(30, seed=seed, longest=12)
    for step in range(2000):
        if step < 120 and draw.random() < 0.4:
            prompt = draw.choice([shorts[len(requests) % 30], LONG[:draw.randrange(20, 200)], (*LONG[:100], len(requests) + 5)])
            requests.append(Request(f"r{len(requests)}", prompt, draw.randrange(1, 25), temperature=draw.choice([0.0, 1.0]),
                                    seed=step, stop_ids=tuple(range(0, 288, 9))))
            engine.add(requests[-1])
        if draw.random() < 0.05 and engine.scheduler.ids:
            name_of_one = draw.choice(sorted(engine.scheduler.ids))
            cancelled.add(name_of_one)
            engine.cancel(name_of_one)
        if engine.has_work:
            results |= ended(engine)
        rows = [row for row, _ in engine.scheduler.rows]
        assert len(set(rows)) == len(rows) == engine.running <= 4 and all(0 <= row < 4 for row in rows)
        parked += engine.scheduler.parked is not None
    assert len(requests) > 30 and parked > 20 and not engine.has_work and not engine.batch.samplers
    assert set(results) == {request.id for request in requests}
    left = {name for name in cancelled if results[name].finish_reason == "cancelled"}
    same(tiny_base, results, [request for request in requests if request.id not in left])
    for request in requests:
        if request.id in left:
            made = results[request.id].token_ids
            assert made == naive_generate(tiny_base, request).token_ids[:len(made)]


def test_short_prompts_get_in_beside_a_long_one(tiny_base: Base) -> None:
    """Each within two steps of its arrival, where the long one takes 25 alone, and at most twice as many beside them."""
    engine, first, steps = Engine(tiny_base, max_batch_size=4), dict[str, int](), 0
    engine.add(Request("long", LONG, 5, stop_ids=()))
    engine.step()
    arrived = {"long": 0}
    while "long" not in first:
        if steps % 3 == 0:
            arrived[f"s{steps}"] = steps
            engine.add(Request(f"s{steps}", (5, 6, 7 + steps), 2, stop_ids=()))
        for output in engine.step():
            if output.token_ids:
                first.setdefault(output.id, steps)
        steps += 1
    early = [name for name, began in arrived.items() if name != "long" and began < steps - 2]
    assert len(early) >= 10 and all(first[name] - arrived[name] <= 2 for name in early)
    assert 25 < first["long"] <= 2 * 25 + 2


def test_a_long_prompt_is_not_overtaken_for_ever(tiny_base: Base) -> None:
    """Two long ones, and always more short ones than there are rows: the second long one comes after the first."""
    engine, first, steps = Engine(tiny_base, max_batch_size=2), dict[str, int](), 0
    for name in ("a", "b"):
        engine.add(Request(name, (*LONG, ord(name)), 3, stop_ids=()))
    while not {"a", "b"} <= set(first):
        while engine.waiting < 4:
            engine.add(Request(f"s{steps}-{engine.waiting}", (5, 6, 7), 3, stop_ids=()))
        for output in engine.step():
            if output.token_ids:
                first.setdefault(output.id, steps)
        steps += 1
        assert steps < 300
    assert first["a"] < first["b"] <= first["a"] + 70


def test_one_long_prompt_alone_stays_where_it_is(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_base, max_batch_size=4)
    monkeypatch.setattr(engine.cache, "move_row", lambda *rows: pytest.fail("moved"))
    request = Request("long", LONG, 5, stop_ids=())
    assert engine.generate([request])[0].token_ids == naive_generate(tiny_base, request).token_ids


def test_a_drafter_that_comes_while_a_prompt_is_parked(tiny_base: Base) -> None:
    """Its row is told to the new proposer as it is, not counted from the decoding ones."""
    engine, results = Engine(tiny_base, max_batch_size=4, draft_slots=16), dict[str, Result]()
    requests = [Request("long", LONG, 20, stop_ids=()), Request("short", (5, 6), 9, stop_ids=())]
    for request in requests:
        engine.add(request)
        engine.step()
    engine.step()
    assert engine.scheduler.parked is not None
    assert [row for row, sequence in engine.scheduler.rows if sequence.request.id == "long"] == [3]
    drafting = engine.prepare(NgramDrafter(min_match=1))
    engine.change(drafting)
    assert drafting.proposer.indexes[3].tokens == list(LONG)  # type: ignore[attr-defined]
    while engine.has_work:
        results |= ended(engine)
    same(tiny_base, results, requests)
    assert results["long"].drafted > 0


def test_heads_read_a_parked_prompt_whole(tiny_base: Base) -> None:
    """What the heads read of a prompt that was moved and computed in turns is what they read of one that came alone."""
    heads = random_heads(tiny_base, "hydra++")
    beside, alone = Engine(tiny_base, heads, max_batch_size=3), Engine(tiny_base, heads, max_batch_size=3)
    long = Request("long", LONG, 40, stop_ids=())
    for engine in (beside, alone):
        engine.add(long)
        engine.step()
    moved = False
    for number in range(100):
        if number % 4 == 0 and beside.scheduler.running < 3:
            beside.add(Request(f"s{number}", (5, 6, number), 2, stop_ids=()))
        beside.step()
        moved |= beside.scheduler.parked is not None
        if any(sequence.request.id == "long" for sequence in beside.scheduler.decoding):
            break
    while not alone.scheduler.decoding:
        alone.step()
    row = next(row for row, sequence in beside.scheduler.rows if sequence.request.id == "long")
    assert moved and beside.scheduler.decoding[row].tokens == alone.scheduler.decoding[0].tokens
    assert (beside.proposer.features[row] - alone.proposer.features[0]).abs().max() < 1e-4  # type: ignore[attr-defined]
