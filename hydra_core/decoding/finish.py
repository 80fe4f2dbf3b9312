"""New tokens are added to the answers, and sequences end: by a stop token or string, by a limit, or when they are cancelled."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from hydra_core.decoding.batch import RunningBatch
from hydra_core.decoding.records import FinishReason, Result, StepOutput
from hydra_core.decoding.scheduler import RunningSequence
from hydra_core.sampling.request import TokenLogprob

Clipped = tuple[list[int], FinishReason | None]
"""The new tokens that belong to an answer, and why the answer ends with them, if it does."""


def clip(sequence: RunningSequence, tokens: list[int], context_limit: int) -> Clipped:
    """Cut `tokens` where the answer ends; none is kept of a sequence whose answer is complete."""
    if sequence.ending is not None:
        return [], sequence.ending
    room = context_limit - len(sequence.request.prompt_ids) - len(sequence.tokens)
    budget = sequence.request.max_new_tokens - len(sequence.tokens)
    for count, token in enumerate(tokens, start=1):
        if sequence.text is not None:
            sequence.text.push([token])
        if token in sequence.stop_ids or (sequence.text is not None and sequence.text.stopped):
            return tokens[:count], "stop"
        if count == budget:
            return tokens[:count], "length"
        if count == room:
            return tokens[:count], "context"
    return tokens, None


def clip_all(batch: RunningBatch, first: int, chosen: list[list[int]]) -> list[Clipped]:
    """`clip` for the decoding sequences from row `first` on; the last kept token of each becomes its root."""
    sequences = batch.decoding[first:first + len(chosen)]
    limit = batch.scheduler.context_limit
    clipped = [clip(sequence, tokens, limit) for sequence, tokens in zip(sequences, chosen, strict=True)]
    # in one write: a device takes as long for one number as for all
    roots = torch.tensor([kept[-1] if kept else 0 for kept, _ in clipped], device=batch.roots.device)
    batch.roots[first:first + len(sequences)] = roots
    return clipped


def emit(batch: RunningBatch, first: int, clipped: list[Clipped], logprobs: list[list[TokenLogprob]]) -> list[StepOutput]:
    """Add the tokens to the decoding sequences from row `first` on; end those that are complete, last row first.

    A complete one whose last hidden state is asked for takes part in one more step, as any other, for that alone.
    """
    sequences, outputs = batch.decoding[first:first + len(clipped)], []
    for offset, (sequence, (kept, reason)) in reversed(list(enumerate(zip(sequences, clipped, strict=True)))):
        sequence.tokens += kept
        reported = tuple(logprobs[offset][:len(kept)]) if sequence.request.logprobs is not None else None
        sequence.logprobs += reported or ()
        sequence.ending = reason
        result = finish(batch, first + offset, reason) if reason and not batch.lacks_state(sequence) else None
        outputs.append(StepOutput(sequence.request.id, tuple(kept), result, reported))
    return outputs[::-1]


def finish(batch: RunningBatch, index: int, reason: FinishReason) -> Result:
    """End the decoding sequence of row `index`; another one may move into the row."""
    batch.keep_prefix(index)
    sequence, moves = batch.scheduler.remove_decoding(index)
    batch.proposer.end(index)
    batch.move(moves)
    if batch.scheduler.prefill is not None:
        batch.prompt_hidden = batch.prompt_hidden.roll(1, dims=0)  # the last of the prefill batch becomes its first
    return _closed(batch, sequence, reason)


def drop_cancelled(batch: RunningBatch) -> list[StepOutput]:
    """End the requests that were cancelled: waiting, prefilled or decoding."""
    scheduler = batch.scheduler
    if not scheduler.cancelled:
        return []
    ended = []
    for request in [request for request in scheduler.waiting if request.id in scheduler.cancelled]:
        scheduler.waiting.remove(request)
        scheduler.forget(request)
        ended.append(Result(request.id, request.prompt_ids, (), "cancelled"))
    for index in reversed(range(len(scheduler.prefill.sequences) if scheduler.prefill else 0)):
        if scheduler.prefill and scheduler.prefill.sequences[index].request.id in scheduler.cancelled:
            batch.prompt_hidden = _without(batch.prompt_hidden, index)
            ended.append(_drop(batch, *scheduler.remove_prefilling(index)))
    for index in reversed(range(len(scheduler.parked.sequences) if scheduler.parked else 0)):
        if scheduler.parked and scheduler.parked.sequences[index].request.id in scheduler.cancelled:
            batch.parked_hidden = _without(batch.parked_hidden, index)
            ended.append(_drop(batch, *scheduler.remove_parked(index)))
    for index in reversed(range(len(scheduler.decoding))):
        if scheduler.decoding[index].request.id in scheduler.cancelled:
            ended.append(finish(batch, index, "cancelled"))
    scheduler.cancelled.clear()
    return [StepOutput(result.id, (), result) for result in ended]


def _without(hidden: Tensor, index: int) -> Tensor:
    """`hidden` [P, width] without row `index`, whose place the last one takes."""
    hidden[index] = hidden[-1]
    return hidden[:-1]


def _drop(batch: RunningBatch, sequence: RunningSequence, moves: list[tuple[int, int]]) -> Result:
    batch.move(moves)
    return _closed(batch, sequence, "cancelled")


def _closed(batch: RunningBatch, sequence: RunningSequence, reason: FinishReason) -> Result:
    """The answer so far, with its counts and times; the batch forgets the sequence."""
    now = time.perf_counter()
    began = sequence.first_token or now
    most = max(sequence.accepted_lengths, default=-1)
    lengths = tuple(sequence.accepted_lengths[length] for length in range(most + 1))
    accepted = sum(length * steps for length, steps in enumerate(lengths))
    request = sequence.request
    states = batch.states.get(request.id) if reason != "cancelled" else None
    hidden = None if states is None else states.first(len(request.prompt_ids) + len(sequence.tokens))
    batch.forget(sequence)
    return Result(request.id, request.prompt_ids, tuple(sequence.tokens), reason, sum(lengths), sequence.drafted, accepted,
                  began - sequence.started, now - began,
                  tuple(sequence.logprobs) if request.logprobs is not None else None,
                  request.lossy_typical is not None, lengths, hidden, sequence.cached_tokens)
