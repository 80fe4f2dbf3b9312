"""The engine: each step runs propose -> verify -> accept -> commit on a batch that sequences join and leave between steps.

Prompts are computed in `prefill`, sequences end in `finish`, `scheduler` decides who runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.base.graphs import step_forward
from hydra_core.base.kv_cache import real_nodes
from hydra_core.base.model import Base
from hydra_core.base.taps import check_taps, last_of
from hydra_core.decoding.batch import RunningBatch
from hydra_core.decoding.clock import Clock
from hydra_core.decoding.finish import Clipped, clip_all, drop_cancelled, emit
from hydra_core.decoding.memory import check_memory
from hydra_core.decoding.prefill import prefill_step
from hydra_core.decoding.prefix_cache import PrefixCache
from hydra_core.decoding.records import StepOutput
from hydra_core.decoding.request_engine import RequestEngine
from hydra_core.decoding.scheduler import IDLE_TOKENS, RunningSequence, Scheduler
from hydra_core.decoding.verify import accept, accept_walking
from hydra_core.errors import InputError
from hydra_core.proposers.base import Accepted, Proposal, Proposer, StepTimes
from hydra_core.proposers.drafter import Context
from hydra_core.proposers.plain import PlainProposer
from hydra_core.proposers.registry import kind_of
from hydra_core.proposers.settings import Drafter
from hydra_core.proposers.suffix_index import SuffixIndex
from hydra_core.sampling.request import Request
from hydra_core.tree.batch import chain
from hydra_core.tree.draft_tree import TreeSet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drafting:
    """A drafter with its trees, and the proposer that `Engine.prepare` made of them for one engine; `taps`: layers of the base
    that it reads; `answers`: the finished answers that it looks into, `prefixes`: what is kept of finished sequences; None:
    none."""

    drafter: Drafter | None
    trees: TreeSet
    proposer: Proposer
    taps: tuple[int, ...] = ()
    answers: SuffixIndex | None = None
    prefixes: PrefixCache | None = None


class Engine(RequestEngine):
    """Decodes requests together. Its tokens are those of plain decoding, whatever runs in the same batch or drafts for it.

    `drafter`: heads, an `NgramDrafter`, an `AdaptiveDrafter` of both, any other of `Drafter`, or None for plain decoding;
    `trees`: the draft tree for each batch size, used by heads alone (default: `default_trees()`); `max_batch_size`: sequences
    that run at once; `context_limit`: tokens of prompt and answer together, at most the base's own limit; `shared_noise`:
    drafters rank candidates with the noise of the coming draw (False only shows what that gains); `graphs`: replay steps as
    CUDA graphs (None: where possible); `draft_slots`: room for draft nodes that every sequence gets at least, so that a later
    drafter of `change` may have larger trees. All memory is allocated here and none later, except for the recording of graphs
    and for finished answers, which a drafter with `suffix` looks into: they stay while the drafter changes and after `reset`,
    up to its `max_tokens`, until `forget_answers`; `prefix_cache`: tokens of finished sequences whose keys and values are kept,
    for prompts that begin with them (a second turn, a common instruction), until `forget_prefixes`. Not thread-safe: one thread
    drives it.
    Raises InputError for limits below 1, for trees that need more heads or candidates than the drafter has, for caches that
    do not fit the memory, and for `graphs=True` where graphs cannot be recorded.
    """

    base: Base

    def __init__(self, base: Base, drafter: Drafter | None = None, trees: TreeSet | None = None, *,
                 max_batch_size: int = 8, context_limit: int | None = None, shared_noise: bool = True,
                 graphs: bool | None = None, draft_slots: int = 0, prefix_cache: int = 0) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("context_limit", context_limit)):
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1")
        self.prefix_cache = prefix_cache if base.supports_tree else 0  # a recurrent state has no beginning to copy
        self.base, self.max_batch_size, self.shared_noise, self.graphs = base, max_batch_size, shared_noise, graphs
        self.context_limit = min(context_limit or base.context_limit, base.context_limit)
        drafter, trees = _usable(base, drafter, trees)
        self.step_nodes = kind_of(drafter).draft_slots(trees)  # the most nodes of a row for whose steps there is memory
        self.draft_slots = max(self.step_nodes, draft_slots)
        slots = self.context_limit + self.draft_slots
        check_memory(base, drafter, max_batch_size, slots, self.step_nodes, kept=self.prefix_cache)
        self.cache = base.allocate(max_batch_size, slots)
        self.clock = Clock()
        self.answers: SuffixIndex | None = None
        self.prefixes: PrefixCache | None = None
        self._start(self._open(drafter, trees))

    def _open(self, drafter: Drafter | None, trees: TreeSet) -> Drafting:
        kind, answers = kind_of(drafter), self.answers
        wanted = kind.answers_kept
        if not wanted:
            answers = None
        elif answers is None or answers.capacity != wanted:
            answers = SuffixIndex(wanted)
        context = Context(self.max_batch_size, self.context_limit + self.draft_slots, trees, self.shared_noise, self.base.device,
                          self.graphs, self.base.ragged, answers, self.base.vocab_size)
        proposer = kind.open(context)
        return Drafting(drafter, trees, proposer, kind.taps, answers, self._prefixes_for(proposer))

    def _prefixes_for(self, proposer: Proposer) -> PrefixCache | None:
        """What is kept of finished sequences goes on being known, unless the proposer has keys and values of its own for them."""
        caches = [self.cache, *proposer.kv_caches]
        if self.prefixes is not None:
            return self.prefixes.for_caches(caches)
        return PrefixCache(self.prefix_cache, caches) if self.prefix_cache else None

    def forget_prefixes(self) -> None:
        """Drop what is kept of finished sequences; the memory stays."""
        if self.prefixes is not None:
            self.prefixes.forget()

    def forget_answers(self) -> None:
        """Drop the finished answers that are kept for drafting, and give their memory back."""
        if self.answers is not None:
            self.answers.forget()

    def _start(self, drafting: Drafting) -> None:
        """Begin without sequences."""
        self.forward = step_forward(self.base, self.cache, self.draft_slots, self.graphs, drafting.taps)
        self._take(drafting)
        self.scheduler = Scheduler(self.max_batch_size, self.context_limit, self.base.supports_tree, self._find_prefix)
        self.batch = RunningBatch(self.base, self.scheduler, self.cache, self.proposer, drafting.taps, self.prefixes)
        self._interrupted = False

    def prepare(self, drafter: Drafter | None = None, trees: TreeSet | None = None) -> Drafting:
        """Make another drafter ready for `change`: all that takes long. Any thread may call it while another one decodes.

        The KV cache stays the only one; heads with a prefix layer get one of their own. Raises InputError as `Engine` does, and
        for trees with more nodes than `draft_slots`.
        """
        drafter, trees = _usable(self.base, drafter, trees)
        nodes, slots = kind_of(drafter).draft_slots(trees), self.context_limit + self.draft_slots
        if nodes > self.draft_slots:
            raise InputError(f"trees: {nodes} nodes are more than the {self.draft_slots} that this engine has room for: "
                             "make a new one")
        check_memory(self.base, drafter, self.max_batch_size, slots, nodes, allocated=self.step_nodes)
        return self._open(drafter, trees)

    @torch.inference_mode()
    def change(self, drafting: Drafting) -> None:
        """Draft with `drafting` of `prepare` from the next step on. Sequences in the batch go on in their rows, with the same
        tokens; where the new heads need more of their past than is known, they are not drafted for any more."""
        for row, sequence in self.scheduler.rows:
            sequence.drafted_for = drafting.proposer.adopt(row, sequence.request.prompt_ids, sequence.tokens)
        if drafting.taps != self.drafting.taps:
            self.forward = step_forward(self.base, self.cache, self.draft_slots, self.graphs, drafting.taps)
        self._take(drafting)
        self.step_nodes = max(self.step_nodes, kind_of(drafting.drafter).draft_slots(drafting.trees))
        self.batch.proposer, self.batch.taps, self.batch.prefixes = drafting.proposer, drafting.taps, drafting.prefixes

    def _find_prefix(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        return self.prefixes.find(prompt_ids) if self.prefixes is not None else ()

    def _take(self, drafting: Drafting) -> None:
        self.drafting, self.proposer, self.prefixes = drafting, drafting.proposer, drafting.prefixes
        if drafting.answers is not None:
            self.answers = drafting.answers

    def reset(self) -> None:
        """Forget all sequences, so that an engine whose step raised an exception can be used again. The KV cache stays; all
        else that the step may have left half done is made anew, and what drafts taught is forgotten."""
        drafter, trees = self.drafting.drafter, self.drafting.trees
        self.batch.proposer = self.proposer = PlainProposer()  # so that its memory is free
        self.drafting = Drafting(drafter, trees, self.proposer, self.drafting.taps)
        self.cache.clear_rows((0, self.max_batch_size))
        self.forget_prefixes()  # the step may have ended while one was kept
        self._start(self._open(drafter, trees))

    @property
    def running(self) -> int:
        return self.scheduler.running

    @property
    def waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def kv_use(self) -> float:
        held = sum(len(sequence.request.prompt_ids) + len(sequence.tokens) for _, sequence in self.scheduler.rows)
        return held / (self.max_batch_size * self.context_limit)

    @property
    def most_prompt_tokens(self) -> int:
        return min(IDLE_TOKENS, self.context_limit) if self.base.supports_tree else self.context_limit

    def unstarted(self) -> list[Request]:
        return [request for request in tuple(self.scheduler.waiting) if request.id not in self.scheduler.cancelled]

    @property
    def times(self) -> StepTimes:
        """Time by phase since the first request."""
        return self.clock.read()

    def check(self, request: Request) -> None:
        self._refuse_interrupted()
        request.check(self.base.vocab_size, self.context_limit, texts=self.base.tokenizer is not None)
        if request.id in self.scheduler.ids:
            raise InputError(f"request {request.id}: id: is already running")

    def add(self, request: Request) -> None:
        self.check(request)
        self.scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        if request_id in self.scheduler.ids:
            self.scheduler.cancelled.add(request_id)

    def step(self) -> list[StepOutput]:
        """Advance every decoding sequence by one verified tree, and the prompts that are prefilled by one chunk.

        An exception leaves sequences half done: every later call raises RuntimeError until `reset`.
        """
        self._refuse_interrupted()
        self._interrupted = True
        outputs = self._step()
        self._interrupted = False
        return outputs

    def _refuse_interrupted(self) -> None:
        if self._interrupted:
            raise RuntimeError("an exception interrupted an earlier step of this engine: call reset(), which forgets sequences")

    @torch.inference_mode()
    def _step(self) -> list[StepOutput]:
        phase = self.clock.phase
        outputs = self._drop_cancelled()
        with phase("prefill"):
            outputs += prefill_step(self.batch)
        if not self.scheduler.decoding:
            return outputs
        before, kept = self.times, [sequence.speculates for sequence in self.scheduler.decoding]
        with phase("draft"):
            proposal = self._propose()
        with phase("verify"):
            hidden, choices, real = self._verify(proposal)
        with phase("accept"):
            accepted = self._accept(proposal, choices, real)
        with phase("commit"):
            clipped = self._commit(proposal, hidden, accepted)
        with phase("commit"):
            if any(kept):  # what is dropped says nothing about the drafter
                self.proposer.feedback(accepted, self.times - before, None if all(kept) else kept)
            outputs += emit(self.batch, 0, clipped, accepted.logprobs)
        return outputs

    def _propose(self) -> Proposal:
        sequences = self.scheduler.decoding
        roots, plain = self.batch.roots[:len(sequences)], [not sequence.speculates for sequence in sequences]
        if all(plain):
            return Proposal(roots[:, None], chain(1))
        proposal = self.proposer.propose(roots, _root_positions(sequences), self.batch.samplers_of(sequences))
        if any(plain):
            proposal.tokens[plain, 1:] = -1
        return proposal

    def _verify(self, proposal: Proposal) -> tuple[Tensor, Tensor, Tensor | None]:
        """One base forward over the nodes.

        Returns hidden states [B, N, D], with the drafter's taps behind them; the argmax tokens [M] int64 where all sequences
        choose by them alone, else logits [M, V] float32; and which nodes those M are, [B, N] bool, None for all.
        """
        sequences, tokens = self.scheduler.decoding, proposal.tokens
        # a device computes empty nodes too, and would have to be asked for the counts
        counts = (tokens >= 0).sum(-1) if self.base.ragged else None
        real = real_nodes(counts, tokens.shape[1])
        hidden = self.forward(tokens.clamp(min=0), proposal.trees, max(_root_positions(sequences)), counts)
        last = last_of(hidden, self.base.vocabulary.width)
        flat = last.flatten(0, 1) if real is None else last[real]
        if all(sampler.simple for sampler in self.batch.samplers_of(sequences)):
            return hidden, self.base.argmax(flat), real
        return hidden, self.base.logits(flat), real

    def _accept(self, proposal: Proposal, choices: Tensor, real: Tensor | None) -> Accepted:
        """The path of each sequence on which the base agrees with the draft."""
        tokens = proposal.tokens
        if choices.dim() == 1:
            chosen = choices.view_as(tokens) if real is None else torch.zeros_like(tokens).masked_scatter_(real, choices)
            return accept(tokens, proposal.trees, chosen)
        sequences = self.scheduler.decoding
        if real is None:
            choices, lines = choices.view(*tokens.shape, -1), None
        else:
            lines = (real.flatten().cumsum(0) - 1).view_as(tokens).tolist()
        return accept_walking(tokens, proposal.trees, choices, _root_positions(sequences), self.batch.samplers_of(sequences),
                              lines)

    def _commit(self, proposal: Proposal, hidden: Tensor, accepted: Accepted) -> list[Clipped]:
        """Keep the accepted nodes in the cache; the proposer learns of them and of the newly chosen tokens."""
        sequences = self.scheduler.decoding
        rows = (0, len(sequences))
        self.cache.commit(rows, accepted.path, accepted.counts)
        for sequence, drafts, tokens in zip(sequences, (proposal.tokens[:, 1:] >= 0).sum(-1).tolist(), accepted.emitted,
                                            strict=True):
            if sequence.ending is None:
                sequence.drafted += drafts
                sequence.accepted_lengths[len(tokens) - 1] += 1
        self.clock.count(proposal.seconds)
        clipped = clip_all(self.batch, 0, accepted.emitted)
        index = torch.arange(len(sequences), device=hidden.device)[:, None]
        kept_hidden = hidden[index, accepted.path]
        self.proposer.commit(rows, kept_hidden, accepted.counts, [kept for kept, _ in clipped])
        self.batch.record(sequences, kept_hidden, accepted.counts)
        return clipped

    @torch.inference_mode()
    def _drop_cancelled(self) -> list[StepOutput]:
        return drop_cancelled(self.batch)


def _usable(base: Base, drafter: Drafter | None, trees: TreeSet | None) -> tuple[Drafter | None, TreeSet]:
    """The drafter that `base` can use, with its trees. Raises InputError for a drafter or trees that do not fit."""
    if drafter is not None and not base.supports_tree:
        log.warning("the base keeps a state that cannot be rolled back: it decodes plainly, without the drafter")
        drafter = None
    kind = kind_of(drafter)
    kind.check(base)
    if kind.taps:
        check_taps(kind.taps, base.vocabulary.config.num_hidden_layers)
    return drafter, kind.trees(trees)


def _root_positions(sequences: Sequence[RunningSequence]) -> list[int]:
    """Position of the newest token of each sequence: it is chosen, but not yet in the cache."""
    return [len(sequence.request.prompt_ids) + len(sequence.tokens) - 1 for sequence in sequences]
