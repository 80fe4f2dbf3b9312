"""Decisions without tensors: who goes in next, with whom, and what is copied."""

from __future__ import annotations

from hydra_core.decoding.scheduler import BUSY_TOKENS, CHUNK, SHARED_TOKENS, Group, Row, Scheduler, Start
from hydra_core.sampling import Request

LIMIT = 2000


def prompt(length: int, first: int = 1) -> tuple[int, ...]:
    return (first, *range(1, length))


def row(request: Request) -> Row:
    return Row(request, frozenset(), None, 0.0)


def request(name: str, ids: tuple[int, ...]) -> Request:
    return Request(name, ids, 5)


def admit(scheduler: Scheduler) -> list[str]:
    """Take the next group straight to decoding; its names."""
    starts = scheduler.next_starts()
    scheduler.decoding += [row(start.request) for start in starts]
    return [start.request.id for start in starts]


def test_the_first_in_the_queue_always_goes_in() -> None:
    """However many short prompts come after it, a long one is not passed over, and order is kept among the alike."""
    scheduler = Scheduler(4, LIMIT)
    scheduler.add(request("s0", prompt(10, 100)))
    scheduler.add(request("long", prompt(1500, 101)))
    for i in range(1, 7):
        scheduler.add(request(f"s{i}", prompt(10, 101 + i)))
    assert admit(scheduler) == ["s0", "s1", "s2", "s3"]
    for _ in range(2):
        scheduler.leave(0)
    assert admit(scheduler) == ["long"]
    assert admit(scheduler) == ["s4"]
    assert admit(scheduler) == [] and [waiting.id for waiting in scheduler.waiting] == ["s5", "s6"]


def test_nothing_goes_in_while_a_group_does() -> None:
    scheduler = Scheduler(4, LIMIT)
    scheduler.add(request("a", prompt(10)))
    starts = scheduler.next_starts()
    scheduler.group = Group(starts, [row(starts[0].request)])
    scheduler.add(request("b", prompt(10, 7)))
    assert scheduler.next_starts() == [] and scheduler.running == 1


def test_a_shared_beginning_is_computed_once() -> None:
    scheduler = Scheduler(8, LIMIT)
    common = tuple(range(3, 103))
    for i in range(4):
        scheduler.add(request(f"r{i}", (*common, 1000 + i, 5)))
    scheduler.add(request("other", tuple(range(200, 290))))
    starts = scheduler.next_starts()
    assert [start.request.id for start in starts] == ["r0", "other"]  # the others wait for r0's keys and values
    scheduler.decoding += [row(start.request) for start in starts]
    starts = scheduler.next_starts()
    assert [(start.request.id, start.shared, start.donor, start.left) for start in starts] == [
        (f"r{i}", 100, 0, 2) for i in (1, 2, 3)]


def test_what_is_never_copied() -> None:
    scheduler = Scheduler(4, LIMIT)
    scheduler.decoding.append(row(request("donor", tuple(range(3, 103)))))
    same = scheduler._start(request("same", tuple(range(3, 103))))
    assert (same.shared, same.left) == (99, 1)  # the last token's hidden state is needed
    assert scheduler._start(request("short", tuple(range(3, 2 + SHARED_TOKENS)))).shared == 0
    plain = Scheduler(4, LIMIT, supports_tree=False)
    plain.decoding.append(row(request("donor", tuple(range(3, 103)))))
    assert plain._start(request("same", tuple(range(3, 103)))).shared == 0


def test_padding_never_leaves_the_cache() -> None:
    """A row that begins late in its slots does not go in with one that needs more columns than it has left."""
    scheduler = Scheduler(4, 200)
    scheduler.decoding.append(row(request("donor", tuple(range(3, 183)))))
    scheduler.add(request("late", tuple(range(3, 198))))
    scheduler.add(request("fresh", tuple(range(300, 330))))
    assert [start.request.id for start in scheduler.next_starts()] == ["late"]


def test_chunks() -> None:
    group = Group([Start(request("a", prompt(1200))), Start(request("b", prompt(700)))],
                  [row(request("a", prompt(1200))), row(request("b", prompt(700)))])
    assert group.chunk(busy=False) == CHUNK and group.chunk(busy=True) == BUSY_TOKENS // 2
    group.done = 1190
    assert group.chunk(busy=False) == 10 and group.chunk(busy=True, supports_tree=False) == 1200


def test_rows_have_no_holes() -> None:
    scheduler = Scheduler(8, LIMIT)
    scheduler.decoding = [row(request(name, prompt(5))) for name in "abc"]
    members = [request(name, prompt(5)) for name in "xy"]
    scheduler.group = Group([Start(member) for member in members], [row(member) for member in members])
    left, moves = scheduler.leave(0)
    assert left.request.id == "a" and moves == [(2, 0), (4, 2)]  # c to the hole, then y to c's place
    assert [r.request.id for r in scheduler.decoding] == ["c", "b"]
    assert [r.request.id for r in scheduler.group.rows] == ["y", "x"]
    left, moves = scheduler.leave_group(0)
    assert left.request.id == "y" and moves == [(3, 2)]
    left, moves = scheduler.leave_group(0)
    assert left.request.id == "x" and moves == [] and scheduler.group is None
