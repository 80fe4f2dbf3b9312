"""Prefill: prompts enter the KV cache chunk by chunk, in steps shared with the sequences that decode."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from hydra_core.base.model import Base
from hydra_core.base.taps import last_of
from hydra_core.decoding.batch import EMPTY, RunningBatch
from hydra_core.decoding.finish import clip_all, emit
from hydra_core.decoding.records import StepOutput
from hydra_core.decoding.scheduler import PrefillBatch, PrefillPrompt, RunningSequence
from hydra_core.decoding.text import TextStream
from hydra_core.sampling.request import TokenLogprob
from hydra_core.sampling.sampler import Sampler, sample, token_logprob
from hydra_core.tree.batch import chain


def prefill_step(batch: RunningBatch) -> list[StepOutput]:
    """Compute one chunk of the prompts that are prefilled, or of the parked ones; when all of the former are complete, the first
    token of each."""
    scheduler = batch.scheduler
    before = scheduler.parked
    moves = scheduler.arrange()
    if scheduler.parked is not before:
        batch.move(moves)
        batch.prompt_hidden, batch.parked_hidden = batch.parked_hidden, batch.prompt_hidden
    prompts = scheduler.next_prompts()
    if prompts:
        _open(batch, prompts)
    turn = scheduler.turn()
    if turn is None:
        return []
    width = 0 if turn.complete else turn.chunk(bool(scheduler.decoding), batch.base.supports_tree)
    if turn is scheduler.parked:
        if width:
            batch.parked_hidden = _compute_chunk(batch, turn, scheduler.parked_first, batch.parked_hidden, width)
        return []
    if width:
        batch.prompt_hidden = _compute_chunk(batch, turn, len(batch.decoding), batch.prompt_hidden, width)
    return _close(batch, turn) if turn.complete else []


def _open(batch: RunningBatch, prompts: list[PrefillPrompt]) -> None:
    """Give rows to new prompts; a prefix that is known already is copied instead of computed."""
    base, now = batch.base, time.perf_counter()
    if batch.proposer.reads_next:
        prompts = [replace(prompt, prefix_length=max(prompt.prefix_length - 1, 0)) for prompt in prompts]
    for row, prompt in enumerate(prompts, start=len(batch.decoding)):
        batch.cache.clear_rows((row, row + 1))
        batch.proposer.admit(row, prompt.request.prompt_ids)
        if prompt.prefix_blocks:
            assert batch.prefixes is not None
            batch.prefixes.restore(prompt.prefix_blocks, row, prompt.prefix_length)
            batch.proposer.restored(row, prompt.prefix_length)
        elif prompt.prefix_length:
            batch.cache.copy_prefix(prompt.prefix_source, row, prompt.prefix_length)
            batch.proposer.copy_prefix(prompt.prefix_source, row, prompt.prefix_length)
        batch.samplers[prompt.request.id] = Sampler(prompt.request, base.vocab_size, base.device)
        batch.open_states(prompt)
    sequences = [_sequence(base, prompt, now) for prompt in prompts]
    batch.scheduler.prefill = PrefillBatch(prompts, sequences)
    batch.prompt_hidden = torch.zeros(len(prompts), base.vocabulary.width, dtype=base.dtype, device=base.device)


def _sequence(base: Base, prompt: PrefillPrompt, now: float) -> RunningSequence:
    request = prompt.request
    stops = base.stop_ids if request.stop_ids is None else request.stop_ids
    text = TextStream(base.decode, request.stop) if request.stop else None
    return RunningSequence(request, frozenset(stops), text, now, prompt.prefix_length)


def _compute_chunk(batch: RunningBatch, prefill: PrefillBatch, first: int, prompt_hidden: Tensor, width: int) -> Tensor:
    """The next `width` tokens of every prompt of a prefill batch in the cache rows from `first` on; shorter prompts are padded.
    Returns `prompt_hidden` [P, width of the base] with the states of the prompts that end here."""
    base, size = batch.base, len(prefill.prompts)
    rows = (first, first + size)
    ids = torch.zeros(size, width, dtype=torch.int64)
    for row, prompt in enumerate(prefill.prompts):
        begin = prompt.prefix_length + prefill.computed
        piece = prompt.request.prompt_ids[begin:begin + width]
        ids[row, :len(piece)] = torch.tensor(piece)
    remaining = torch.tensor([prompt.remaining for prompt in prefill.prompts], device=base.device) - prefill.computed
    counts = remaining.clamp(0, width)
    hidden = base.forward(ids.to(base.device), batch.cache, rows, chain(width), counts, batch.taps)
    batch.cache.lengths[rows[0]:rows[1]] += counts
    batch.proposer.commit(rows, hidden, counts)
    batch.record(prefill.sequences, hidden, counts)
    ends = (remaining > 0) & (remaining <= width)
    last = hidden[torch.arange(size, device=hidden.device), (remaining - 1).clamp(0, width - 1)]
    last = last_of(last, base.vocabulary.width)
    prefill.computed += width
    return torch.where(ends[:, None], last, prompt_hidden)


def _close(batch: RunningBatch, prefill: PrefillBatch) -> list[StepOutput]:
    """Its sequences join the decoding ones with their first token."""
    first, now, sequences = len(batch.decoding), time.perf_counter(), prefill.sequences
    logits = batch.base.logits(batch.prompt_hidden)
    positions = [len(sequence.request.prompt_ids) for sequence in sequences]
    samplers = batch.samplers_of(sequences)
    tokens = sample(logits, positions, samplers)
    logprobs: list[list[TokenLogprob]] = []
    for index, (sequence, sampler, token) in enumerate(zip(sequences, samplers, tokens, strict=True)):
        sequence.first_token = now
        sampler.record(token)
        count = sequence.request.logprobs
        logprobs.append([] if count is None else [token_logprob(logits[index], token, count)])
    batch.scheduler.decoding += sequences
    batch.scheduler.prefill = None
    no_hidden = batch.prompt_hidden.new_empty(len(sequences), 0, (1 + len(batch.taps)) * batch.base.vocabulary.width)
    no_counts = torch.zeros(len(sequences), dtype=torch.int64, device=no_hidden.device)
    batch.prompt_hidden = EMPTY
    clipped = clip_all(batch, first, [[token] for token in tokens])
    batch.proposer.commit((first, first + len(sequences)), no_hidden, no_counts, [kept for kept, _ in clipped])
    return emit(batch, first, clipped, logprobs)
