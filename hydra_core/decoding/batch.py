"""The running batch: the sequences that decode or are prefilled, with all that is kept for each and moves with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_core.base.kv_cache import KVCache
from hydra_core.base.model import Base
from hydra_core.base.taps import last_of
from hydra_core.decoding.prefix_cache import PrefixCache
from hydra_core.decoding.scheduler import PrefillPrompt, RunningSequence, Scheduler
from hydra_core.decoding.states import RecordedStates
from hydra_core.proposers.base import Proposer
from hydra_core.sampling.sampler import Sampler

EMPTY = torch.empty(0)


class RunningBatch:
    """The scheduler's sequences, and for each of them a row of the KV cache, a row of the proposer, a root and a sampler.

    Decoding sequences have rows 0 .. D - 1, the P sequences whose prompts are prefilled have rows D .. D + P - 1. `roots`: [R]
    int64, the newest token of each decoding sequence: chosen, but not in the cache yet; `samplers`, `states`: by request id;
    `prompt_hidden`, `parked_hidden`: [P, width], the hidden state of the last token of each prompt that is prefilled or parked,
    once it is computed; `taps`: layers of the base that the proposer reads; `prefixes`: what is kept of finished sequences, None:
    nothing.
    """

    def __init__(self, base: Base, scheduler: Scheduler, cache: KVCache, proposer: Proposer, taps: Sequence[int] = (),
                 prefixes: PrefixCache | None = None) -> None:
        self.base, self.scheduler, self.cache, self.proposer, self.taps = base, scheduler, cache, proposer, tuple(taps)
        self.prefixes = prefixes
        self.roots = torch.zeros(scheduler.max_batch_size, dtype=torch.int64, device=base.device)
        self.samplers: dict[str, Sampler] = {}
        self.states: dict[str, RecordedStates] = {}
        self.prompt_hidden = self.parked_hidden = EMPTY

    @property
    def decoding(self) -> list[RunningSequence]:
        """The sequences that decode, by row."""
        return self.scheduler.decoding

    def samplers_of(self, sequences: Sequence[RunningSequence]) -> list[Sampler]:
        """The sampler of each of `sequences`."""
        return [self.samplers[sequence.request.id] for sequence in sequences]

    def open_states(self, prompt: PrefillPrompt) -> None:
        """Make room for the hidden states of a new sequence, if its request asks for them; those of a prefix that is copied are
        known."""
        request, vocabulary = prompt.request, self.base.vocabulary
        if request.hidden_states:
            room = min(len(request.prompt_ids) + request.max_new_tokens, self.scheduler.context_limit)
            states = self.states[request.id] = RecordedStates(room, vocabulary.width, self.base.dtype)
            if prompt.prefix_length:
                states.copy_prefix(self.states[self.decoding[prompt.prefix_source].request.id], prompt.prefix_length)

    def record(self, sequences: Sequence[RunningSequence], hidden: Tensor, counts: Tensor) -> None:
        """Keep hidden states [B, M, D] of tokens that are now in the cache, the first `counts` [B] of each of `sequences`, where
        a request asks for them; taps behind them are not kept."""
        if not self.states:
            return
        on_host = last_of(hidden, self.base.vocabulary.width).cpu()
        for sequence, states, count in zip(sequences, on_host, counts.tolist(), strict=True):
            if (known := self.states.get(sequence.request.id)) is not None:
                known.append(states[:count])

    def lacks_state(self, sequence: RunningSequence) -> bool:
        """Whether the hidden state of its newest token is asked for and not known: it is not in the cache yet."""
        states = self.states.get(sequence.request.id)
        return states is not None and states.count < len(sequence.request.prompt_ids) + len(sequence.tokens)

    def keep_prefix(self, row: int) -> None:
        """Keep the keys and values of the decoding sequence in `row`, which ends."""
        sequence = self.decoding[row]
        if self.prefixes is None or not sequence.drafted_for:  # the proposer lacks its own
            return
        self.proposer.catch_up(row)
        self.prefixes.keep(row, (*sequence.request.prompt_ids, *sequence.tokens)[:-1])  # the newest is not in the cache

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Carry out moves of rows (from, to), in order."""
        for source, target in moves:
            self.cache.move_row(source, target)
            self.proposer.move(source, target)
            self.roots[target] = self.roots[source]

    def forget(self, sequence: RunningSequence) -> None:
        """Drop what is kept by request id."""
        self.scheduler.forget(sequence.request)
        del self.samplers[sequence.request.id]
        self.states.pop(sequence.request.id, None)
