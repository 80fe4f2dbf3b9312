"""Decides which requests run, which wait and which prompts are prefilled next. No tensors: rows are numbers, prompts tuples.

    waiting   requests in order of arrival
    prefill   prompts that are prefilled together, chunk by chunk, in cache rows D .. D + P - 1
    parked    long prompts whose prefill shares its steps with that of short ones, in the last cache rows
    decoding  sequences in cache rows 0 .. D - 1, each advanced by every step

Rows have no holes: a sequence that ends is replaced by the last of its kind, and the scheduler returns the rows to move.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hydra_core.decoding.prefix_cache import BLOCK
from hydra_core.decoding.records import FinishReason
from hydra_core.decoding.text import TextStream
from hydra_core.sampling.request import Request, TokenLogprob

SHORT_PROMPT = 32
"""Prompts up to this length are prefilled together whatever the ratio of their lengths."""
SHARED_TOKENS = 32
"""A common prefix shorter than this is computed again rather than copied."""
BUSY_TOKENS = 512
"""Prompt tokens computed in one step while sequences decode: limits how long those wait for their next token."""
IDLE_TOKENS = 4096
"""Prompt tokens computed in one step while no sequence decodes."""
SEARCHED = 8
"""Requests of the queue for which a shared prefix is looked up at every step while long prompts are prefilled."""
CHUNK = 512
"""Tokens of one prompt in one forward: limits the mask and the activations."""


@dataclass
class RunningSequence:
    """A request in the batch, with its answer so far.

    `started`, `first_token`: clock seconds of admission and of the first token; `cached_tokens`: tokens of the prompt that were
    copied, not computed; `drafted`: nodes verified;
    `accepted_lengths`: how many steps accepted each number of drafts; `drafted_for`: the proposer knows as much of its past as
    drafts need; `ending`: why the answer is complete, while one more step computes the hidden state of its last token.
    """

    request: Request
    stop_ids: frozenset[int]
    text: TextStream | None
    started: float
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_token: float = 0.0
    drafted: int = 0
    accepted_lengths: Counter[int] = field(default_factory=Counter)
    drafted_for: bool = True
    ending: FinishReason | None = None

    @property
    def speculates(self) -> bool:
        """Whether its steps verify drafts."""
        return self.drafted_for and self.request.speculate


@dataclass(frozen=True)
class PrefillPrompt:
    """A prompt to prefill; its first `prefix_length` tokens are copied from decoding row `prefix_source`, or from the blocks
    `prefix_blocks` of a `PrefixCache`."""

    request: Request
    prefix_length: int = 0
    prefix_source: int = -1
    prefix_blocks: tuple[int, ...] = ()

    @property
    def remaining(self) -> int:
        """Tokens to compute."""
        return len(self.request.prompt_ids) - self.prefix_length


@dataclass
class PrefillBatch:
    """Prompts that are prefilled together; `computed` tokens of what remains of each are in the cache."""

    prompts: list[PrefillPrompt]
    sequences: list[RunningSequence]
    computed: int = 0

    @property
    def longest(self) -> int:
        """Tokens to compute of the longest prompt."""
        return max(prompt.remaining for prompt in self.prompts)

    def chunk(self, busy: bool, supports_tree: bool = True) -> int:
        """Tokens of each prompt in the next forward: at least one, at most what the step may compute, and all of them for a
        base that cannot take a prompt in pieces."""
        if not supports_tree:
            return self.longest
        budget = (BUSY_TOKENS if busy else IDLE_TOKENS) // len(self.sequences)
        return min(max(1, budget), CHUNK, self.longest - self.computed)

    @property
    def complete(self) -> bool:
        """Whether all prompts are in the cache; this may also happen when the longest is cancelled."""
        return self.computed >= self.longest

    def ends_next(self, busy: bool) -> bool:
        """Whether the next chunk is the last one."""
        return self.longest - self.computed <= self.chunk(busy)


class Scheduler:
    """The state above and the decisions about it.

    `max_batch_size`: sequences that run at once; `context_limit`: tokens of one sequence; `supports_tree`: see `Decoder`;
    `find_kept`: from a prompt to the blocks that a `PrefixCache` has of it.
    """

    def __init__(self, max_batch_size: int, context_limit: int, supports_tree: bool = True,
                 find_kept: Callable[[Sequence[int]], tuple[int, ...]] = lambda prompt_ids: ()) -> None:
        self.find_kept = find_kept
        self.max_batch_size, self.context_limit, self.supports_tree = max_batch_size, context_limit, supports_tree
        self.waiting: deque[Request] = deque()
        self.decoding: list[RunningSequence] = []
        self.prefill: PrefillBatch | None = None
        self.parked: PrefillBatch | None = None
        self.parked_first = max_batch_size  # cache row of the first parked prompt
        self._parked_turn = False
        self.ids: set[str] = set()
        self.cancelled: set[str] = set()

    @property
    def running(self) -> int:
        """Sequences in the cache. May be read by other threads."""
        return len(self.decoding) + sum(len(batch.sequences) for batch in (self.prefill, self.parked) if batch)

    @property
    def rows(self) -> list[tuple[int, RunningSequence]]:
        """All sequences in the cache, with their rows."""
        found = list(enumerate([*self.decoding, *(self.prefill.sequences if self.prefill else ())]))
        return found + list(enumerate(self.parked.sequences if self.parked else (), start=self.parked_first))

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.ids)

    def add(self, request: Request) -> None:
        """Append a request to the queue."""
        self.ids.add(request.id)
        self.waiting.append(request)

    def forget(self, request: Request) -> None:
        """Release the id of a request that has ended."""
        self.ids.discard(request.id)
        self.cancelled.discard(request.id)

    def next_prompts(self) -> list[PrefillPrompt]:
        """Take the prompts of the next prefill batch from the queue; none while one is prefilled or no row is free.

        The first request of the queue is always among them, so no request starves; only while long prompts are parked, the
        first short one is. Others join it in order when their lengths are similar, so that little padding is computed, unless
        they share a long prefix with a member: these wait for the next prefill batch and copy the prefix.
        """
        free = self.parked_first - len(self.decoding)
        if self.prefill is not None or free == 0:
            return []
        taken: list[PrefillPrompt] = []
        left: deque[Request] = deque()
        while self.waiting and len(taken) < free:
            request = self.waiting.popleft()
            if self.parked is not None and not self._is_short(request, len(taken) + len(left)):
                left.append(request)
                continue
            prompt = self._with_prefix(request)
            if not taken or self._fits(prompt, taken):
                taken.append(prompt)
            else:
                left.append(request)
        self.waiting.extendleft(reversed(left))
        return taken

    def arrange(self) -> list[tuple[int, int]]:
        """Park the prefill batch while short prompts wait that it would keep out, or take the parked one back for its last chunk;
        returns the moves (from, to) of cache rows, in order. After moves the two have changed places, one of them empty."""
        prefill, parked, first = self.prefill, self.parked, len(self.decoding)
        if parked is not None and prefill is None and parked.ends_next(bool(self.decoding)):
            moves = [(self.parked_first + row, first + row) for row in range(len(parked.sequences))]
            self.prefill, self.parked, self.parked_first = parked, None, self.max_batch_size
        elif prefill is not None and parked is None and self._keeps_short_ones_out(prefill):
            size = len(prefill.sequences)
            self.prefill, self.parked, self.parked_first = None, prefill, self.max_batch_size - size
            moves = [(first + row, self.parked_first + row) for row in reversed(range(size))]
        else:
            return []
        return [(source, target) for source, target in moves if source != target]

    def _keeps_short_ones_out(self, prefill: PrefillBatch) -> bool:
        short = prefill.longest - prefill.computed <= BUSY_TOKENS
        if short or not self.supports_tree or self.running == self.max_batch_size:
            return False
        return any(self._is_short(request, place) for place, request in enumerate(self.waiting))

    def _is_short(self, request: Request, place: int) -> bool:
        """Whether a request at this place of the queue has few tokens to compute; copied ones are counted for the first ones of
        the queue alone, since it takes a while to find them."""
        if len(request.prompt_ids) <= BUSY_TOKENS:
            return True
        return place < SEARCHED and self._with_prefix(request).remaining <= BUSY_TOKENS

    def turn(self) -> PrefillBatch | None:
        """Whose next chunk this step computes: they take turns, and the last chunk of a parked batch waits until it is back."""
        if self.prefill is None or self.parked is None:
            return self.prefill or self.parked
        self._parked_turn = not self._parked_turn and not self.parked.ends_next(bool(self.decoding))
        return self.parked if self._parked_turn else self.prefill

    def _with_prefix(self, request: Request) -> PrefillPrompt:
        """Find the longest known prefix: of a decoding sequence, or kept of a finished one. The last token is never copied, since
        its hidden state is needed."""
        best = PrefillPrompt(request)
        for row, sequence in enumerate(self.decoding):
            if not sequence.drafted_for:  # the proposer has nothing to copy
                continue
            if request.hidden_states and not sequence.request.hidden_states:  # they were not recorded
                continue
            shared = _common(request.prompt_ids[:-1], sequence.request.prompt_ids)
            if self.supports_tree and shared >= SHARED_TOKENS and shared > best.prefix_length:
                best = PrefillPrompt(request, shared, row)
        if not request.hidden_states and len(blocks := self.find_kept(request.prompt_ids)) * BLOCK > best.prefix_length:
            best = PrefillPrompt(request, len(blocks) * BLOCK, prefix_blocks=blocks)
        return best

    def _fits(self, prompt: PrefillPrompt, taken: Sequence[PrefillPrompt]) -> bool:
        members = [*taken, prompt]
        lengths = [member.remaining for member in members]
        similar = max(lengths) <= max(SHORT_PROMPT, 2 * min(lengths)) and max(lengths) * len(lengths) <= IDLE_TOKENS
        # padding is written to the cache too and needs room there
        room = all(member.prefix_length + max(lengths) <= self.context_limit for member in members)
        return similar and room and not any(
            _common(prompt.request.prompt_ids[:-1], other.request.prompt_ids) >= prompt.prefix_length + SHARED_TOKENS
            for other in taken)

    def remove_decoding(self, index: int) -> tuple[RunningSequence, list[tuple[int, int]]]:
        """Remove decoding sequence `index`; also returns the moves (from, to) of cache rows that close the hole, in order."""
        last, moves = len(self.decoding) - 1, []
        sequence = self.decoding[index]
        if index != last:
            self.decoding[index] = self.decoding[last]
            moves.append((last, index))
        self.decoding.pop()
        if self.prefill is not None:  # its rows follow the decoding ones: the last becomes the first
            moves.append((last + len(self.prefill.sequences), last))
            self.prefill.sequences.insert(0, self.prefill.sequences.pop())
            self.prefill.prompts.insert(0, self.prefill.prompts.pop())
        return sequence, moves

    def remove_prefilling(self, index: int) -> tuple[RunningSequence, list[tuple[int, int]]]:
        """Remove sequence `index` of the prefill batch; returns as `remove_decoding` does."""
        assert self.prefill is not None
        sequence, moves = _remove(self.prefill, index, len(self.decoding))
        if not self.prefill.sequences:
            self.prefill = None
        return sequence, moves

    def remove_parked(self, index: int) -> tuple[RunningSequence, list[tuple[int, int]]]:
        """Remove sequence `index` of the parked batch; returns as `remove_decoding` does."""
        assert self.parked is not None
        sequence, moves = _remove(self.parked, index, self.parked_first)
        if not self.parked.sequences:
            self.parked, self.parked_first = None, self.max_batch_size
        return sequence, moves


def _remove(prefill: PrefillBatch, index: int, first: int) -> tuple[RunningSequence, list[tuple[int, int]]]:
    """Remove sequence `index` of a batch in the cache rows from `first` on: the last one takes its row."""
    last = len(prefill.sequences) - 1
    sequence, moves = prefill.sequences[index], []
    if index != last:
        prefill.sequences[index], prefill.prompts[index] = prefill.sequences[last], prefill.prompts[last]
        moves.append((first + last, first + index))
    prefill.sequences.pop()
    prefill.prompts.pop()
    return sequence, moves


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i in range(length) if one[i] != other[i])
