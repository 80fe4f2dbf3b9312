"""Decisions without tensors: which prompts are prefilled next, together with which, and what is copied."""

from __future__ import annotations

import pytest

from hydra_core.decoding.scheduler import (
    BUSY_TOKENS,
    CHUNK,
    SHARED_TOKENS,
    PrefillBatch,
    PrefillPrompt,
    RunningSequence,
    Scheduler,
)
from hydra_core.sampling import Request

LIMIT = 2000


def prompt(length: int, first: int = 1) -> tuple[int, ...]:
    return (first, *range(1, length))


def sequence(request: Request) -> RunningSequence:
    return RunningSequence(request, frozenset(), None, 0.0)


def request(name: str, ids: tuple[int, ...]) -> Request:
    return Request(name, ids, 5)


def admit(scheduler: Scheduler) -> list[str]:
    """Take the next prefill batch straight to decoding; its request ids."""
    prompts = scheduler.next_prompts()
    scheduler.decoding += [sequence(prompt.request) for prompt in prompts]
    return [prompt.request.id for prompt in prompts]


def test_the_first_in_the_queue_is_always_taken() -> None:
    """However many short prompts come after it, a long one is not passed over, and order is kept among the alike."""
    scheduler = Scheduler(4, LIMIT)
    scheduler.add(request("s0", prompt(10, 100)))
    scheduler.add(request("long", prompt(1500, 101)))
    for i in range(1, 7):
        scheduler.add(request(f"s{i}", prompt(10, 101 + i)))
    assert admit(scheduler) == ["s0", "s1", "s2", "s3"]
    for _ in range(2):
        scheduler.remove_decoding(0)
    assert admit(scheduler) == ["long"]
    assert admit(scheduler) == ["s4"]
    assert admit(scheduler) == [] and [waiting.id for waiting in scheduler.waiting] == ["s5", "s6"]


def test_nothing_is_taken_while_prompts_are_prefilled() -> None:
    scheduler = Scheduler(4, LIMIT)
    scheduler.add(request("a", prompt(10)))
    prompts = scheduler.next_prompts()
    scheduler.prefill = PrefillBatch(prompts, [sequence(prompts[0].request)])
    scheduler.add(request("b", prompt(10, 7)))
    assert scheduler.next_prompts() == [] and scheduler.running == 1


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = Scheduler(8, LIMIT)
    common = tuple(range(3, 103))
    for i in range(4):
        scheduler.add(request(f"r{i}", (*common, 1000 + i, 5)))
    scheduler.add(request("other", tuple(range(200, 290))))
    prompts = scheduler.next_prompts()
    assert [prompt.request.id for prompt in prompts] == ["r0", "other"]  # the others wait for r0's keys and values
    scheduler.decoding += [sequence(prompt.request) for prompt in prompts]
    prompts = scheduler.next_prompts()
    assert [(prompt.request.id, prompt.prefix_length, prompt.prefix_source, prompt.remaining) for prompt in prompts] == [
        (f"r{i}", 100, 0, 2) for i in (1, 2, 3)]


@pytest.mark.parametrize(("tokens", "supports_tree", "copied"), [
    (tuple(range(3, 103)), True, 99),  # the last token's hidden state is needed
    (tuple(range(3, 103)), False, 0), (tuple(range(3, 3 + SHARED_TOKENS)), True, 0),
    (tuple(range(3, 4 + SHARED_TOKENS)), True, SHARED_TOKENS), (tuple(range(3, 2 + SHARED_TOKENS)), True, 0)])
def test_what_is_copied_and_what_never(tokens: tuple[int, ...], supports_tree: bool, copied: int) -> None:
    scheduler = Scheduler(4, LIMIT, supports_tree=supports_tree)
    scheduler.decoding.append(sequence(request("source", tuple(range(3, 103)))))
    scheduler.add(request("late", tokens))
    (found,) = scheduler.next_prompts()
    assert (found.prefix_length, found.prefix_source, found.remaining) == (copied, 0 if copied else -1, len(tokens) - copied)


def test_padding_never_leaves_the_cache() -> None:
    """A prompt with a long copied prefix is not batched with one that is longer than the room it has left."""
    scheduler = Scheduler(4, 200)
    scheduler.decoding.append(sequence(request("source", tuple(range(3, 183)))))
    scheduler.add(request("late", tuple(range(3, 198))))
    scheduler.add(request("fresh", tuple(range(300, 330))))
    assert [prompt.request.id for prompt in scheduler.next_prompts()] == ["late"]


def test_chunks() -> None:
    prefill = PrefillBatch([PrefillPrompt(request("a", prompt(1200))), PrefillPrompt(request("b", prompt(700)))],
                  [sequence(request("a", prompt(1200))), sequence(request("b", prompt(700)))])
    assert prefill.chunk(busy=False) == CHUNK and prefill.chunk(busy=True) == BUSY_TOKENS // 2
    prefill.computed = 1190
    assert prefill.chunk(busy=False) == 10 and prefill.chunk(busy=True, supports_tree=False) == 1200


def test_rows_have_no_holes() -> None:
    scheduler = Scheduler(8, LIMIT)
    scheduler.decoding = [sequence(request(name, prompt(5))) for name in "abc"]
    members = [request(name, prompt(5)) for name in "xy"]
    scheduler.prefill = PrefillBatch([PrefillPrompt(member) for member in members], [sequence(member) for member in members])
    left, moves = scheduler.remove_decoding(0)
    assert left.request.id == "a" and moves == [(2, 0), (4, 2)]  # c to the hole, then y to c's place
    assert [r.request.id for r in scheduler.decoding] == ["c", "b"]
    assert [r.request.id for r in scheduler.prefill.sequences] == ["y", "x"]
    left, moves = scheduler.remove_prefilling(0)
    assert left.request.id == "y" and moves == [(3, 2)]
    left, moves = scheduler.remove_prefilling(0)
    assert left.request.id == "x" and moves == [] and scheduler.prefill is None


def parked_scheduler() -> Scheduler:
    """One sequence decodes; two long prompts of which 512 tokens are computed make room for a short one."""
    scheduler = Scheduler(8, LIMIT)
    scheduler.decoding = [sequence(request("a", prompt(5)))]
    members = [request(name, prompt(1500 + i, 7 + i)) for i, name in enumerate("xy")]
    scheduler.prefill = PrefillBatch([PrefillPrompt(member) for member in members], [sequence(member) for member in members], 512)
    scheduler.ids = {"a", "x", "y"}
    assert scheduler.arrange() == []  # nobody waits
    scheduler.add(request("long", prompt(600, 3)))
    assert scheduler.arrange() == []  # nobody who is short
    scheduler.add(request("short", prompt(BUSY_TOKENS, 5)))
    assert scheduler.arrange() == [(2, 7), (1, 6)]  # the last one first: a row is free when something moves into it
    return scheduler


def test_long_prompts_are_parked_in_the_last_rows_and_come_back() -> None:
    scheduler = parked_scheduler()
    assert [(row, one.request.id) for row, one in scheduler.rows] == [(0, "a"), (6, "x"), (7, "y")] and scheduler.running == 3
    prompts = scheduler.next_prompts()
    assert [one.request.id for one in prompts] == ["short"] and [one.id for one in scheduler.waiting] == ["long"]
    scheduler.prefill = PrefillBatch(prompts, [sequence(prompts[0].request)])
    parked = scheduler.parked
    assert parked is not None and [scheduler.turn() for _ in range(4)] == [parked, scheduler.prefill] * 2
    parked.computed = 1501 - 200
    assert [scheduler.turn() for _ in range(3)] == [scheduler.prefill] * 3  # the last chunk waits until they are back
    assert scheduler.arrange() == []
    scheduler.decoding += scheduler.prefill.sequences  # type: ignore[union-attr]
    scheduler.prefill = None
    assert scheduler.arrange() == [(6, 2), (7, 3)]
    assert scheduler.prefill is parked and scheduler.parked is None and scheduler.next_prompts() == []
    assert [(row, one.request.id) for row, one in scheduler.rows] == [(0, "a"), (1, "short"), (2, "x"), (3, "y")]


def test_a_parked_prompt_may_be_cancelled() -> None:
    scheduler = parked_scheduler()
    left, moves = scheduler.remove_parked(0)
    assert left.request.id == "x" and moves == [(7, 6)] and [row for row, _ in scheduler.rows] == [0, 6]
    left, moves = scheduler.remove_parked(0)
    assert left.request.id == "y" and moves == [] and scheduler.parked is None and scheduler.parked_first == 8


def test_what_is_not_parked() -> None:
    """A batch that is nearly complete, or whose base takes prompts whole, and none where no row is left."""
    for most, supports_tree, computed in ((8, True, 1500 - BUSY_TOKENS), (8, False, 0), (2, True, 0)):
        scheduler = Scheduler(most, LIMIT, supports_tree)
        scheduler.decoding = [sequence(request("a", prompt(5)))]
        long = request("x", prompt(1500, 7))
        scheduler.prefill = PrefillBatch([PrefillPrompt(long)], [sequence(long)], computed)
        scheduler.add(request("short", prompt(5, 5)))
        assert scheduler.arrange() == [] and scheduler.parked is None
