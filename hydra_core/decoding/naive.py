"""The reference: one row, one token at a time, nothing clever. Every engine path must equal it."""

from __future__ import annotations

import torch

from hydra_core.base.model import Base
from hydra_core.decoding.choose import Sampling, choose
from hydra_core.decoding.records import FinishReason, Request, Result
from hydra_core.tree.topology import PLAIN


@torch.inference_mode()
def naive_generate(base: Base, request: Request, context_limit: int | None = None) -> Result:
    """Decode one request plainly. Raises InputError as `Request.check` does."""
    limit = min(context_limit or base.context_limit, base.context_limit)
    request.check(base.vocab_size, limit)
    stops = base.stop_ids if request.stop_ids is None else request.stop_ids
    sampling = Sampling((request.temperature,), (request.seed,))
    cache = base.allocate(1, limit)
    hidden = base.prefill([request.prompt_ids], cache, (0, 1))[:, -1:]
    tokens: list[int] = []
    reason: FinishReason | None = None
    while reason is None:
        position = torch.tensor([[len(request.prompt_ids) + len(tokens)]], device=base.device)
        tokens.append(int(choose(base.logits(hidden), position, sampling)))
        if tokens[-1] in stops:
            reason = "stop"
        elif len(tokens) == request.max_new_tokens:
            reason = "length"
        elif len(request.prompt_ids) + len(tokens) == limit:
            reason = "context"
        else:
            token = torch.tensor([[tokens[-1]]], device=base.device)
            hidden = base.forward(token, cache, (0, 1), PLAIN.topology)
            cache.lengths[0] += 1
    return Result(request.id, request.prompt_ids, tuple(tokens), reason, steps=len(tokens) - 1)
