"""Who runs, who waits and which prompts go in next. No tensors: rows are numbers, prompts are tuples.

    waiting   requests in order of arrival
    group     prompts going in together, chunk by chunk, in cache rows D .. D + P - 1
    decoding  rows 0 .. D - 1, each advanced by every step

Rows have no holes: whoever leaves is replaced by the last of its kind, and the engine is told which rows to move.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra_core.decoding.text import TextStream
from hydra_core.sampling.request import Request, TokenLogprob

SHORT_PROMPT = 32
"""Prompts up to this length go in together whatever their ratio."""
SHARED_TOKENS = 32
"""A common beginning shorter than this is computed again rather than copied."""
BUSY_TOKENS = 512
"""Prompt tokens computed in one step beside decoding rows: bounds how long those wait for their next token."""
IDLE_TOKENS = 4096
"""The same when nobody is decoding."""
CHUNK = 512
"""Tokens of one prompt in one forward: bounds the mask and the activations."""


@dataclass
class Row:
    """A request in the batch."""

    request: Request
    stop_ids: frozenset[int]
    text: TextStream | None
    started: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_token: float = 0.0
    drafted: int = 0
    accepted_lengths: Counter[int] = field(default_factory=Counter)
    """How many steps accepted so many drafts."""


@dataclass(frozen=True)
class Start:
    """A request about to go in. `shared`: its first tokens are those of decoding row `donor`, and are copied."""

    request: Request
    shared: int = 0
    donor: int = -1

    @property
    def left(self) -> int:
        return len(self.request.prompt_ids) - self.shared


@dataclass
class Group:
    """Prompts that go in together; `done` tokens of what is `left` of each are in the cache."""

    starts: list[Start]
    rows: list[Row]
    done: int = 0

    @property
    def longest(self) -> int:
        return max(start.left for start in self.starts)

    def chunk(self, busy: bool, supports_tree: bool = True) -> int:
        """Tokens of each prompt in the next forward: at least one, at most what the step may take, and all of them
        where a prompt cannot be taken in pieces."""
        if not supports_tree:
            return self.longest
        budget = (BUSY_TOKENS if busy else IDLE_TOKENS) // len(self.rows)
        return min(max(1, budget), CHUNK, self.longest - self.done)

    @property
    def complete(self) -> bool:
        """Whether all of every prompt is in the cache; so it may become when the longest is cancelled."""
        return self.done >= self.longest


class Scheduler:
    """The state above and the decisions about it.

    `max_batch_size`: rows of all kinds; `context_limit`: tokens of one; `supports_tree`: see `Decoder`.
    """

    def __init__(self, max_batch_size: int, context_limit: int, supports_tree: bool = True) -> None:
        self.max_batch_size, self.context_limit, self.supports_tree = max_batch_size, context_limit, supports_tree
        self.waiting: deque[Request] = deque()
        self.decoding: list[Row] = []
        self.group: Group | None = None
        self.ids: set[str] = set()
        self.cancelled: set[str] = set()

    @property
    def running(self) -> int:
        """Rows in the cache. Other threads may ask too."""
        group = self.group
        return len(self.decoding) + (len(group.rows) if group else 0)

    @property
    def has_work(self) -> bool:
        return bool(self.ids)

    def add(self, request: Request) -> None:
        self.ids.add(request.id)
        self.waiting.append(request)

    def forget(self, request: Request) -> None:
        self.ids.discard(request.id)
        self.cancelled.discard(request.id)

    def next_starts(self) -> list[Start]:
        """Take the prompts of the next group off the queue; none while a group is going in or no row is free.

        The first in the queue is always among them, so nobody is passed over for ever. Others join it in order when
        they are of similar length, so that little padding is computed, unless they share a long beginning with a
        member: they wait for the next group and copy it.
        """
        free = self.max_batch_size - len(self.decoding)
        if self.group is not None or free == 0:
            return []
        taken: list[Start] = []
        left: deque[Request] = deque()
        while self.waiting and len(taken) < free:
            request = self.waiting.popleft()
            start = self._start(request)
            if not taken or self._fits(start, taken):
                taken.append(start)
            else:
                left.append(request)
        self.waiting.extendleft(reversed(left))
        return taken

    def _start(self, request: Request) -> Start:
        """Look for the decoding row that begins as this prompt does for longest. The last token is never copied: its
        hidden state is needed."""
        best = Start(request)
        for donor, row in enumerate(self.decoding):
            shared = _common(request.prompt_ids[:-1], row.request.prompt_ids)
            if self.supports_tree and shared >= SHARED_TOKENS and shared > best.shared:
                best = Start(request, shared, donor)
        return best

    def _fits(self, start: Start, taken: Sequence[Start]) -> bool:
        members = [*taken, start]
        lengths = [member.left for member in members]
        alike = max(lengths) <= max(SHORT_PROMPT, 2 * min(lengths)) and max(lengths) * len(lengths) <= IDLE_TOKENS
        # padding is written too, and must find room
        room = all(member.shared + max(lengths) <= self.context_limit for member in members)
        return alike and room and not any(
            _common(start.request.prompt_ids[:-1], other.request.prompt_ids) >= start.shared + SHARED_TOKENS
            for other in taken)

    def leave(self, index: int) -> tuple[Row, list[tuple[int, int]]]:
        """Take out decoding row `index`; also the moves (from, to) of cache rows that close the hole, in order."""
        last, moves = len(self.decoding) - 1, []
        row = self.decoding[index]
        if index != last:
            self.decoding[index] = self.decoding[last]
            moves.append((last, index))
        self.decoding.pop()
        if self.group is not None:  # its rows follow the decoding ones: the last becomes the first
            moves.append((last + len(self.group.rows), last))
            self.group.rows.insert(0, self.group.rows.pop())
            self.group.starts.insert(0, self.group.starts.pop())
        return row, moves

    def leave_group(self, index: int) -> tuple[Row, list[tuple[int, int]]]:
        """Take out row `index` of the group."""
        assert self.group is not None
        last = len(self.group.rows) - 1
        row, moves = self.group.rows[index], []
        if index != last:
            self.group.rows[index], self.group.starts[index] = self.group.rows[last], self.group.starts[last]
            moves.append((len(self.decoding) + last, len(self.decoding) + index))
        self.group.rows.pop()
        self.group.starts.pop()
        if not self.group.rows:
            self.group = None
        return row, moves


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i in range(length) if one[i] != other[i])
