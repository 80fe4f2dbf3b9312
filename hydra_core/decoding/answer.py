"""What belongs to an answer, why it ends, and what is told of it then."""

from __future__ import annotations

import time

from hydra_core.decoding.records import FinishReason, Result
from hydra_core.decoding.scheduler import Row


def clip(row: Row, tokens: list[int], context_limit: int) -> tuple[list[int], FinishReason | None]:
    """What of the new tokens belongs to the answer, and why it ends there if it does."""
    room = context_limit - len(row.request.prompt_ids) - len(row.tokens)
    budget = row.request.max_new_tokens - len(row.tokens)
    for count, token in enumerate(tokens, start=1):
        if row.text is not None:
            row.text.push([token])
        if token in row.stop_ids or (row.text is not None and row.text.stopped):
            return tokens[:count], "stop"
        if count == budget:
            return tokens[:count], "length"
        if count == room:
            return tokens[:count], "context"
    return tokens, None


def to_result(row: Row, reason: FinishReason) -> Result:
    """The answer as it stands, with how it came about."""
    now = time.perf_counter()
    began = row.first_token or now
    lengths = tuple(row.accepted_lengths[length] for length in range(max(row.accepted_lengths, default=-1) + 1))
    accepted = sum(length * steps for length, steps in enumerate(lengths))
    return Result(row.request.id, row.request.prompt_ids, tuple(row.tokens), reason, sum(lengths), row.drafted, accepted,
                  began - row.started, now - began,
                  tuple(row.logprobs) if row.request.logprobs is not None else None,
                  row.request.lossy_typical is not None, lengths)
