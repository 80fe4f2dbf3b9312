"""The reference loop: one sequence, one token at a time, no optimisation. The engine must give the same tokens."""

from __future__ import annotations

import torch

from hydra_core.base.model import Base
from hydra_core.decoding.records import FinishReason, Result
from hydra_core.decoding.text import TextStream
from hydra_core.sampling.request import Request, TokenLogprob
from hydra_core.sampling.sampler import Sampler, sample, token_logprob
from hydra_core.tree.batch import chain


@torch.inference_mode()
def naive_generate(base: Base, request: Request, context_limit: int | None = None) -> Result:
    """Decode one request with plain decoding. Raises InputError as `Request.check` does."""
    limit = min(context_limit or base.context_limit, base.context_limit)
    request.check(base.vocab_size, limit, texts=base.tokenizer is not None)
    stops = base.stop_ids if request.stop_ids is None else request.stop_ids
    sampler = Sampler(request, base.vocab_size, base.device)
    text = TextStream(base.decode, request.stop)
    cache = base.allocate(1, limit)
    hidden = base.prefill([request.prompt_ids], cache, (0, 1))[:, -1:]
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    reason: FinishReason | None = None
    while reason is None:
        logits = base.logits(hidden)[:, 0]
        tokens += sample(logits, [len(request.prompt_ids) + len(tokens)], [sampler])
        sampler.record(tokens[-1])
        if request.logprobs is not None:
            logprobs.append(token_logprob(logits[0], tokens[-1], request.logprobs))
        if request.stop:
            text.push(tokens[-1:])
        if tokens[-1] in stops or text.stopped:
            reason = "stop"
        elif len(tokens) == request.max_new_tokens:
            reason = "length"
        elif len(request.prompt_ids) + len(tokens) == limit:
            reason = "context"
        else:
            token = torch.tensor([[tokens[-1]]], device=base.device)
            hidden = base.forward(token, cache, (0, 1), chain(1))
            cache.lengths[0] += 1
    return Result(request.id, request.prompt_ids, tuple(tokens), reason, steps=len(tokens) - 1,
                  logprobs=tuple(logprobs) if request.logprobs is not None else None,
                  accepted_lengths=(len(tokens) - 1,) if len(tokens) > 1 else ())
