"""The running batch: propose -> verify -> accept -> commit, rows joining and leaving between steps."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_core.base.graphs import step_forward
from hydra_core.base.kv_cache import real_nodes
from hydra_core.base.model import Base
from hydra_core.decoding.answer import clip, to_result
from hydra_core.decoding.clock import Clock
from hydra_core.decoding.memory import check_memory
from hydra_core.decoding.records import FinishReason, Result, StepOutput
from hydra_core.decoding.scheduler import Group, Row, Scheduler, Start
from hydra_core.decoding.text import TextStream
from hydra_core.decoding.verify import accept, accept_walking
from hydra_core.errors import InputError
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import Drafter
from hydra_core.proposers.base import Accepted, Proposal, StepTimes
from hydra_core.proposers.registry import lookahead_slots, open_proposer
from hydra_core.sampling.request import Request, TokenLogprob
from hydra_core.sampling.sampler import Sampler, sample, token_logprob
from hydra_core.tree.topology import PLAIN, TreeSet, chain, default_trees

log = logging.getLogger(__name__)
EMPTY = torch.empty(0)


class Engine:
    """Decodes requests together and never changes a token, whatever runs beside a row or drafts for it.

    `drafter`: heads, an `NgramDrafter`, an `AdaptiveDrafter` of both, or None for plain decoding; `trees`: the draft tree
    for each batch size (heads alone; a small default when not given); `max_batch_size`: rows that run at once;
    `context_limit`: prompt and answer together, at most the base's own; `shared_noise`: drafters rank by the noise of the
    draw to come (False only shows what that is worth); `graphs`: replay steps as CUDA graphs (None: where that is
    possible). All memory is taken here and none later, but for the recording of graphs. Not thread safe: one thread
    drives it.
    Raises InputError for limits below 1, when the trees ask for more heads or candidates than the drafter has, when the
    caches do not fit the memory, and for graphs where there can be none.
    """

    def __init__(self, base: Base, drafter: Drafter | None = None, trees: TreeSet | None = None, *,
                 max_batch_size: int = 8, context_limit: int | None = None, shared_noise: bool = True,
                 graphs: bool | None = None) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("context_limit", context_limit)):
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1")
        self.base, self.max_batch_size = base, max_batch_size
        self.context_limit = min(context_limit or base.context_limit, base.context_limit)
        if drafter is not None and not base.supports_tree:
            log.warning("the base keeps a state that cannot be taken back: decoding plainly, without the drafter")
            drafter = None
        if not isinstance(drafter, HeadDrafter):
            trees = TreeSet({1: PLAIN})
        elif trees is None:
            trees = default_trees()
        if isinstance(drafter, HeadDrafter):
            _check_trees(trees, drafter)
        num_lookahead_slots = lookahead_slots(drafter, trees)
        slots = self.context_limit + num_lookahead_slots
        check_memory(base, drafter, max_batch_size, slots, num_lookahead_slots)
        self.cache = base.allocate(max_batch_size, slots)
        self.forward = step_forward(base, self.cache, num_lookahead_slots, graphs)
        self.proposer = open_proposer(drafter, trees, max_batch_size, slots, shared_noise, base.device, graphs, base.ragged)
        self.roots = torch.zeros(max_batch_size, dtype=torch.int64, device=base.device)
        self.scheduler = Scheduler(max_batch_size, self.context_limit, base.supports_tree)
        self.samplers: dict[str, Sampler] = {}  # by request id, for the rows that run
        self.clock = Clock()
        self._last_hidden = EMPTY  # [P, D]: of the prompts going in, where their last token is reached

    @property
    def running(self) -> int:
        """Rows that decode or whose prompt is going in."""
        return self.scheduler.running

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self.scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_work

    @property
    def times(self) -> StepTimes:
        """Where the time went, from the first request on."""
        return self.clock.read()

    def check(self, request: Request) -> None:
        """Raise InputError when `request` cannot be decoded here."""
        request.check(self.base.vocab_size, self.context_limit, texts=self.base.tokenizer is not None)
        if request.id in self.scheduler.ids:
            raise InputError(f"request {request.id}: id: is already running")

    def add(self, request: Request) -> None:
        """Queue a request; it joins the batch at a later step. Raises InputError as `check` does."""
        self.check(request)
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; an id that is not here is no error, since it may just have finished."""
        if request_id in self.scheduler.ids:
            self.scheduler.cancelled.add(request_id)

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Advance every decoding row by one verified tree, and the prompts that are going in by one chunk."""
        phase = self.clock.phase
        outputs = self._drop_cancelled()
        with phase("prefill"):
            outputs += self._prefill()
        if not self.scheduler.decoding:
            return outputs
        before, whole = self.times, all(row.request.speculate for row in self.scheduler.decoding)
        with phase("draft"):
            proposal = self._propose()
        with phase("verify"):
            hidden, choices, real = self._verify(proposal)
        with phase("accept"):
            accepted = self._accept(proposal, choices, real)
        with phase("commit"):
            outputs += self._commit(proposal, hidden, accepted, whole)
        if whole:
            self.proposer.timed(self.times - before)
        return outputs

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Decode all of them; results in the order given. Raises InputError before any work if one is bad, or if two
        have the same id."""
        for request in requests:
            self.check(request)
        if twice := [name for name, count in Counter(request.id for request in requests).items() if count > 1]:
            raise InputError(f"request {twice[0]}: id: stands twice in the list")
        results = {result.id: result for result in self.stream(requests)}
        return [results[request.id] for request in requests]

    def answer(self, prompts: Sequence[str], max_new_tokens: int = 256, **settings: Any) -> list[str]:
        """Texts for prompts, in order; each prompt is one user turn where the base has a chat template.

        `settings`: fields of `Request`. Raises InputError before any work if a prompt or a setting is bad.
        """
        requests = [Request(str(number), tuple(self.base.encode_prompt(prompt)), max_new_tokens, **settings)
                    for number, prompt in enumerate(prompts)]
        texts = []
        for request, result in zip(requests, self.generate(requests), strict=True):
            text = TextStream(self.base.decode, request.stop)
            text.push(result.token_ids)
            text.finish()
            texts.append(text.sent)
        return texts

    def stream(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results as they finish; requests are pulled only as rows come free.

        Left early, or by the InputError of a bad request, it cancels those of its requests that still run.
        """
        source, mine = iter(requests), set[str]()
        try:
            while True:
                while self.running + self.waiting < self.max_batch_size and (request := next(source, None)) is not None:
                    self.add(request)
                    mine.add(request.id)
                if not self.has_work:
                    return
                for output in self.step():
                    if output.result is not None:
                        mine.discard(output.id)
                        yield output.result
        finally:
            for name in mine:
                self.cancel(name)
            self._drop_cancelled()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _propose(self) -> Proposal:
        rows = self.scheduler.decoding
        roots, plain = self.roots[:len(rows)], [not row.request.speculate for row in rows]
        if all(plain):
            return Proposal(roots[:, None], chain(1))
        proposal = self.proposer.propose(roots, _root_positions(rows), self._samplers(rows))
        if any(plain):
            proposal.tokens[plain, 1:] = -1
        return proposal

    def _verify(self, proposal: Proposal) -> tuple[Tensor, Tensor, Tensor | None]:
        """One base forward over the nodes: hidden states [B, N, D]; the likeliest tokens [M] int64 where those are all that rows
        choose by, else logits [M, V] float32; and which nodes those M are, [B, N] bool, None for all."""
        rows, tokens = self.scheduler.decoding, proposal.tokens
        # a device runs them all, and would have to be asked
        counts = (tokens >= 0).sum(-1) if self.base.ragged else None
        real = real_nodes(counts, tokens.shape[1])
        hidden = self.forward(tokens.clamp(min=0), proposal.forest, max(_root_positions(rows)), counts)
        asked = hidden.flatten(0, 1) if real is None else hidden[real]
        if all(sampler.simple for sampler in self._samplers(rows)):
            return hidden, self.base.argmax(asked), real
        return hidden, self.base.logits(asked), real

    def _accept(self, proposal: Proposal, choices: Tensor, real: Tensor | None) -> Accepted:
        """The path of each row on which the base agrees with the draft."""
        tokens = proposal.tokens
        if choices.dim() == 1:
            chosen = choices.view_as(tokens) if real is None else torch.zeros_like(tokens).masked_scatter_(real, choices)
            return accept(tokens, proposal.forest, chosen)
        rows = self.scheduler.decoding
        if real is None:
            choices, lines = choices.view(*tokens.shape, -1), None
        else:
            lines = (real.flatten().cumsum(0) - 1).view_as(tokens).tolist()
        return accept_walking(tokens, proposal.forest, choices, _root_positions(rows), self._samplers(rows), lines)

    def _samplers(self, rows: Sequence[Row]) -> list[Sampler]:
        return [self.samplers[row.request.id] for row in rows]

    def _commit(self, proposal: Proposal, hidden: Tensor, accepted: Accepted, whole: bool) -> list[StepOutput]:
        rows = self.scheduler.decoding
        span = (0, len(rows))
        self.cache.commit(span, accepted.path, accepted.counts)
        if whole:  # else drafts were taken away, and that they fell says nothing
            self.proposer.learn(proposal, accepted)
        batch = torch.arange(len(rows), device=hidden.device)[:, None]
        self.proposer.observe(span, hidden[batch, accepted.path], accepted.counts)
        for row, drafts, tokens in zip(rows, (proposal.tokens[:, 1:] >= 0).sum(-1).tolist(), accepted.emitted,
                                       strict=True):
            row.drafted += drafts
            row.accepted_lengths[len(tokens) - 1] += 1
        self.clock.count(proposal.seconds)
        return self._emit(0, accepted.emitted, accepted.logprobs)

    # -- prompts go in -----------------------------------------------------------------------------------------------

    def _prefill(self) -> list[StepOutput]:
        """One chunk of the prompts that are going in; the first token of each once all of them are."""
        starts = self.scheduler.next_starts()
        if starts:
            self._open_group(starts)
        group = self.scheduler.group
        if group is None:
            return []
        if not group.complete:
            self._forward_chunk(group, group.chunk(bool(self.scheduler.decoding), self.base.supports_tree))
        return self._close_group(group) if group.complete else []

    def _open_group(self, starts: list[Start]) -> None:
        """Rows for new prompts; beginnings shared with decoding rows are copied instead of computed."""
        first, now = len(self.scheduler.decoding), time.perf_counter()
        for row, start in enumerate(starts, start=first):
            self.cache.clear_rows((row, row + 1))
            self.proposer.admit(row, start.request.prompt_ids)
            if start.shared:
                self.cache.copy_beginning(start.donor, row, start.shared)
                self.proposer.copy_beginning(start.donor, row, start.shared)
        self.scheduler.group = Group(starts, [self._row(start.request, now) for start in starts])
        width = self.base.vocabulary.width
        self._last_hidden = torch.zeros(len(starts), width, dtype=self.base.dtype, device=self.base.device)

    def _row(self, request: Request, now: float) -> Row:
        stops = self.base.stop_ids if request.stop_ids is None else request.stop_ids
        text = TextStream(self.base.decode, request.stop) if request.stop else None
        self.samplers[request.id] = Sampler(request, self.base.vocab_size, self.base.device)
        return Row(request, frozenset(stops), text, now)

    def _forward_chunk(self, group: Group, width: int) -> None:
        """The next `width` tokens of every prompt of the group; shorter prompts are padded."""
        first = len(self.scheduler.decoding)
        rows = (first, first + len(group.rows))
        ids = torch.zeros(len(group.rows), width, dtype=torch.int64)
        for row, start in enumerate(group.starts):
            begin = start.shared + group.done
            piece = start.request.prompt_ids[begin:begin + width]
            ids[row, :len(piece)] = torch.tensor(piece)
        left = torch.tensor([start.left for start in group.starts], device=self.base.device) - group.done
        counts = left.clamp(0, width)
        hidden = self.base.forward(ids.to(self.base.device), self.cache, rows, chain(width), counts)
        self.cache.lengths[rows[0]:rows[1]] += counts
        self.proposer.observe(rows, hidden, counts)
        ends = (left > 0) & (left <= width)
        batch = torch.arange(len(group.rows), device=hidden.device)
        last = hidden[batch, (left - 1).clamp(0, width - 1)]
        self._last_hidden = torch.where(ends[:, None], last, self._last_hidden)
        group.done += width

    def _close_group(self, group: Group) -> list[StepOutput]:
        """Its rows join the decoding ones with their first token."""
        first, now = len(self.scheduler.decoding), time.perf_counter()
        logits = self.base.logits(self._last_hidden)
        positions = [len(row.request.prompt_ids) for row in group.rows]
        samplers = self._samplers(group.rows)
        tokens = sample(logits, positions, samplers)
        logprobs: list[list[TokenLogprob]] = []
        for index, (row, sampler, token) in enumerate(zip(group.rows, samplers, tokens, strict=True)):
            row.first_token = now
            sampler.record(token)
            asked = row.request.logprobs
            logprobs.append([] if asked is None else [token_logprob(logits[index], token, asked)])
        self.scheduler.decoding += group.rows
        self.scheduler.group, self._last_hidden = None, EMPTY
        return self._emit(first, [[token] for token in tokens], logprobs)

    # -- rows leave --------------------------------------------------------------------------------------------------

    def _emit(self, first: int, emitted: list[list[int]], logprobs: list[list[TokenLogprob]]) -> list[StepOutput]:
        """Give each decoding row from `first` on its new tokens; end the rows that are done, last row first."""
        rows = self.scheduler.decoding[first:first + len(emitted)]
        clipped = [clip(row, tokens, self.context_limit) for row, tokens in zip(rows, emitted, strict=True)]
        # at once: a device takes as long for one number as for all
        self.roots[first:first + len(rows)] = torch.tensor([kept[-1] for kept, _ in clipped], device=self.roots.device)
        outputs = []
        for offset, (row, (kept, reason)) in reversed(list(enumerate(zip(rows, clipped, strict=True)))):
            index = first + offset
            row.tokens += kept
            said = tuple(logprobs[offset][:len(kept)]) if row.request.logprobs is not None else None
            row.logprobs += said or ()
            self.proposer.emit(index, kept)
            result = self._finish(index, reason) if reason else None
            outputs.append(StepOutput(row.request.id, tuple(kept), result, said))
        return outputs[::-1]

    def _finish(self, index: int, reason: FinishReason) -> Result:
        row, moves = self.scheduler.leave(index)
        self._move(moves)
        if self.scheduler.group is not None:
            self._last_hidden = self._last_hidden.roll(1, dims=0)  # as the group's rows
        self._forget(row)
        return to_result(row, reason)

    def _forget(self, row: Row) -> None:
        self.scheduler.forget(row.request)
        del self.samplers[row.request.id]

    def _move(self, moves: list[tuple[int, int]]) -> None:
        for source, target in moves:
            self.cache.move_row(source, target)
            self.proposer.move(source, target)
            self.roots[target] = self.roots[source]

    @torch.inference_mode()
    def _drop_cancelled(self) -> list[StepOutput]:
        scheduler = self.scheduler
        if not scheduler.cancelled:
            return []
        ended = []
        for request in [request for request in scheduler.waiting if request.id in scheduler.cancelled]:
            scheduler.waiting.remove(request)
            scheduler.forget(request)
            ended.append(Result(request.id, request.prompt_ids, (), "cancelled"))
        for index in reversed(range(len(scheduler.group.rows) if scheduler.group else 0)):
            ended += self._drop_from_group(index)
        for index in reversed(range(len(scheduler.decoding))):
            if scheduler.decoding[index].request.id in scheduler.cancelled:
                ended.append(self._finish(index, "cancelled"))
        scheduler.cancelled.clear()
        return [StepOutput(result.id, (), result) for result in ended]

    def _drop_from_group(self, index: int) -> list[Result]:
        group = self.scheduler.group
        assert group is not None
        if group.rows[index].request.id not in self.scheduler.cancelled:
            return []
        self._last_hidden[index] = self._last_hidden[-1]
        self._last_hidden = self._last_hidden[:-1]
        row, moves = self.scheduler.leave_group(index)
        self._move(moves)
        self._forget(row)
        return [to_result(row, "cancelled")]


def _check_trees(trees: TreeSet, drafter: HeadDrafter) -> None:
    if trees.max_depth > drafter.num_heads:
        raise InputError(f"trees: depth {trees.max_depth} needs more than the drafter's {drafter.num_heads} heads")
    highest = max((rank for tree in trees.trees.values() for path in tree.paths for rank in path), default=0)
    if highest >= len(drafter.draft_vocab):
        raise InputError(f"trees: rank {highest} needs more than the {len(drafter.draft_vocab)} tokens that may be drafted")


def _root_positions(rows: Sequence[Row]) -> list[int]:
    """Where the newest token of each row stands: chosen, but not yet in the cache."""
    return [len(row.request.prompt_ids) + len(row.tokens) - 1 for row in rows]
