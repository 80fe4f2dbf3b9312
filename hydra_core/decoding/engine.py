"""The running batch: propose -> verify -> accept -> commit, rows joining and leaving between steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hydra_core.base.model import Base
from hydra_core.decoding.accept import Accepted, accept
from hydra_core.decoding.choose import Sampling, choose
from hydra_core.decoding.propose import Proposal, open_session
from hydra_core.decoding.records import FinishReason, Request, Result, StepOutput
from hydra_core.drafters import HeadDrafter, NgramDrafter
from hydra_core.errors import InputError
from hydra_core.tree.topology import PLAIN, TreeSet, default_trees

PREFILL_TOKENS = 4096  # padded prompt tokens in one forward


@dataclass
class _Row:
    """A running request: bookkeeping without tensors."""

    request: Request
    started: float
    stop_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    first_token: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Decodes requests together and never changes a token, whatever runs beside a row or drafts for it.

    `drafter`: heads, an `NgramDrafter`, or None for plain decoding; `trees`: the draft tree for each batch size (heads
    only; a small default when not given); `max_batch`: rows that run at once; `context_limit`: prompt and answer
    together, at most the base's own. Not thread safe: one thread drives it. Raises InputError when the trees are deeper
    than the drafter has heads.
    """

    def __init__(self, base: Base, drafter: HeadDrafter | NgramDrafter | None = None, trees: TreeSet | None = None, *,
                 max_batch: int = 8, context_limit: int | None = None) -> None:
        self.base, self.max_batch = base, max_batch
        self.context_limit = min(context_limit or base.context_limit, base.context_limit)
        if not isinstance(drafter, HeadDrafter):
            trees = TreeSet({1: PLAIN})
        elif trees is None:
            trees = default_trees()
        if isinstance(drafter, HeadDrafter) and trees.max_depth > drafter.num_heads:
            raise InputError(f"trees: depth {trees.max_depth} needs more than the drafter's {drafter.num_heads} heads")
        nodes = drafter.length + 1 if isinstance(drafter, NgramDrafter) else trees.max_nodes
        slots = self.context_limit + max(nodes, trees.max_depth + 1)
        self.cache = base.allocate(max_batch, slots)
        self.session = open_session(drafter, trees, max_batch, slots)
        self.roots = torch.zeros(max_batch, dtype=torch.int64, device=base.device)
        self._rows: list[_Row] = []
        self._waiting: deque[Request] = deque()
        self._ids: set[str] = set()
        self._cancelled: set[str] = set()

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._rows or self._waiting)

    def check(self, request: Request) -> None:
        """Raise InputError when `request` cannot be decoded here."""
        request.check(self.base.vocab_size, self.context_limit)
        if request.id in self._ids:
            raise InputError(f"request {request.id}: id: is already running")

    def add(self, request: Request) -> None:
        """Queue a request; it joins the batch at a later step. Raises InputError as `check` does."""
        self.check(request)
        self._ids.add(request.id)
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; an id that is not here is no error, since it may just have finished."""
        if request_id in self._ids:
            self._cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Admit waiting requests, then advance every running row by one verified tree."""
        outputs = self._drop_cancelled() + self._admit()
        if not self._rows:
            return outputs
        proposal = self._propose()
        hidden, accepted = self._verify(proposal)
        return outputs + self._commit(proposal, hidden, accepted)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Decode all of them; results in the order given. Raises InputError before any work if one is bad."""
        for request in requests:
            self.check(request)
        results = {result.id: result for result in self.stream(requests)}
        return [results[request.id] for request in requests]

    def stream(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results as they finish; requests are pulled only as rows come free."""
        source = iter(requests)
        exhausted = False
        while True:
            while not exhausted and self.running + self.waiting < self.max_batch:
                request = next(source, None)
                if request is None:
                    exhausted = True
                else:
                    self.add(request)
            if not self.has_work:
                return
            yield from (output.result for output in self.step() if output.result is not None)

    # -- one step ----------------------------------------------------------------------------------------------------

    def _propose(self) -> Proposal:
        running = len(self._rows)
        return self.session.propose(self.roots[:running], self.cache.lengths[:running], self._sampling(0, running))

    def _verify(self, proposal: Proposal) -> tuple[Tensor, Accepted]:
        """One base forward over all nodes, and the path of each row on which the base agrees."""
        running = len(self._rows)
        hidden = self.base.forward(proposal.tokens.clamp(min=0), self.cache, (0, running), proposal.topology)
        depths = torch.tensor(proposal.topology.depths, device=hidden.device)
        positions = self.cache.lengths[:running, None] + depths + 1
        chosen = choose(self.base.logits(hidden), positions, self._sampling(0, running))
        return hidden, accept(proposal.tokens, proposal.topology, chosen)

    def _commit(self, proposal: Proposal, hidden: Tensor, accepted: Accepted) -> list[StepOutput]:
        rows = (0, len(self._rows))
        self.cache.commit(rows, accepted.path, accepted.counts)
        batch = torch.arange(rows[1], device=hidden.device)[:, None]
        self.session.observe(rows, hidden[batch, accepted.path], accepted.counts)
        drafted = (proposal.tokens[:, 1:] >= 0).sum(-1).tolist()
        emitted, counts = accepted.emitted.tolist(), accepted.counts.tolist()
        for row, drafts, count in zip(self._rows, drafted, counts, strict=True):
            row.steps += 1
            row.drafted += drafts
            row.accepted += count - 1
        return self._emit(0, [tokens[:count] for tokens, count in zip(emitted, counts, strict=True)])

    # -- rows join and leave -----------------------------------------------------------------------------------------

    def _admit(self) -> list[StepOutput]:
        """Prefill waiting requests into free rows, similar lengths together so that little padding is computed."""
        free = self.max_batch - len(self._rows)
        fresh = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        outputs: list[StepOutput] = []
        for group in _groups_by_length(fresh):
            outputs += self._prefill(group)
        return outputs

    def _prefill(self, requests: list[Request]) -> list[StepOutput]:
        started = time.perf_counter()
        first = len(self._rows)
        rows = (first, first + len(requests))
        for row, request in enumerate(requests, start=first):
            stops = self.base.stop_ids if request.stop_ids is None else request.stop_ids
            self._rows.append(_Row(request, started, frozenset(stops)))
            self.session.admit(row, request.prompt_ids)
        hidden = self.base.prefill([request.prompt_ids for request in requests], self.cache, rows)
        counts = self.cache.lengths[rows[0]:rows[1]].clone()
        self.session.observe(rows, hidden, counts)
        last = hidden[torch.arange(len(requests), device=hidden.device), counts - 1]
        chosen = choose(self.base.logits(last)[:, None], counts[:, None], self._sampling(*rows))
        now = time.perf_counter()
        for fresh in self._rows[first:]:
            fresh.first_token = now
        return self._emit(first, chosen.tolist())

    def _emit(self, first: int, emitted: list[list[int]]) -> list[StepOutput]:
        """Give each row from `first` on its new tokens; end the rows that are done, last row first."""
        outputs = []
        for offset, tokens in reversed(list(enumerate(emitted))):
            index = first + offset
            row = self._rows[index]
            kept, reason = self._clip(row, tokens)
            row.tokens += kept
            self.session.emit(index, kept)
            self.roots[index] = kept[-1]
            result = self._finish(index, reason) if reason else None
            outputs.append(StepOutput(row.request.id, tuple(kept), result))
        return outputs[::-1]

    def _clip(self, row: _Row, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """What of the new tokens belongs to the answer, and why it ends there if it does."""
        room = self.context_limit - len(row.request.prompt_ids) - len(row.tokens)
        budget = row.request.max_new_tokens - len(row.tokens)
        for count, token in enumerate(tokens, start=1):
            if token in row.stop_ids:
                return tokens[:count], "stop"
            if count == budget:
                return tokens[:count], "length"
            if count == room:
                return tokens[:count], "context"
        return tokens, None

    def _finish(self, index: int, reason: FinishReason) -> Result:
        """Take a row out; the last row moves into its place so that running rows have no holes."""
        row = self._rows[index]
        last = len(self._rows) - 1
        if index != last:
            self.cache.move_row(last, index)
            self.session.move(last, index)
            self.roots[index] = self.roots[last]
            self._rows[index] = self._rows[last]
        self._rows.pop()
        self._ids.discard(row.request.id)
        self._cancelled.discard(row.request.id)
        now = time.perf_counter()
        began = row.first_token or now
        return Result(row.request.id, row.request.prompt_ids, tuple(row.tokens), reason, row.steps, row.drafted,
                      row.accepted, began - row.started, now - began)

    def _drop_cancelled(self) -> list[StepOutput]:
        if not self._cancelled:
            return []
        outputs = []
        for request in [request for request in self._waiting if request.id in self._cancelled]:
            self._waiting.remove(request)
            self._ids.discard(request.id)
            outputs.append(StepOutput(request.id, (), Result(request.id, request.prompt_ids, (), "cancelled")))
        for index in reversed(range(len(self._rows))):
            if self._rows[index].request.id in self._cancelled:
                result = self._finish(index, "cancelled")
                outputs.append(StepOutput(result.id, (), result))
        self._cancelled.clear()
        return outputs

    def _sampling(self, start: int, stop: int) -> Sampling:
        requests = [row.request for row in self._rows[start:stop]]
        return Sampling(tuple(r.temperature for r in requests), tuple(r.seed for r in requests))


def _groups_by_length(requests: list[Request]) -> list[list[Request]]:
    """Split into groups that pad little: a group's longest prompt is at most twice its shortest (or 32 tokens)."""
    groups: list[list[Request]] = []
    for request in sorted(requests, key=lambda r: len(r.prompt_ids)):
        length = len(request.prompt_ids)
        group = groups[-1] if groups else None
        fits = group and length <= max(32, 2 * len(group[0].prompt_ids)) and length * (len(group) + 1) <= PREFILL_TOKENS
        if group and fits:
            group.append(request)
        else:
            groups.append([request])
    return groups
