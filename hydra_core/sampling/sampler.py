"""The base's choice of the next token, the same in any batch, and the drafters' ranking with its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_core.base.vocabulary import argmax
from hydra_core.kernels import ops
from hydra_core.sampling.noise import gumbel, position_key
from hydra_core.sampling.request import Request, TokenLogprob


class Sampler:
    """How one sequence chooses its tokens: the request's settings, and the token counts that penalties need.

    `simple`: the choice is the argmax of the base's logits, and no log probabilities are reported.
    """

    def __init__(self, request: Request, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.request = request
        self.simple = (request.temperature == 0 and not request.penalised and request.logprobs is None
                       and request.lossy_typical is None)
        self.in_prompt: Tensor | None = None
        self.counts: Tensor | None = None
        if request.penalised:
            self.counts = torch.zeros(vocab_size, device=device)
            self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.in_prompt[torch.tensor(request.prompt_ids, device=device)] = True

    def record(self, token: int) -> None:
        """Count a chosen token."""
        if self.counts is not None:
            self.counts[token] += 1

    def process(self, logits: Tensor) -> Tensor:
        """Penalties, temperature and truncation: scores [V] float32 from `logits` [V]; tokens that are cut off are -inf."""
        request = self.request
        if self.counts is not None and self.in_prompt is not None:
            seen = self.in_prompt | (self.counts > 0)
            weight = request.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / weight, logits * weight), logits)
            logits = logits - request.presence_penalty * (self.counts > 0) - request.frequency_penalty * self.counts
        if request.temperature == 0:
            return logits
        scores = logits / torch.tensor([request.temperature], device=logits.device)  # rounds as `_processed` does
        if 0 < request.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(request.top_k).values[-1], -math.inf)
        if request.top_p < 1:
            scores = _nucleus(scores, request.top_p)
        if request.min_p > 0:
            scores = scores.masked_fill(scores < scores.max() + math.log(request.min_p), -math.inf)
        return scores


def _nucleus(scores: Tensor, mass: float) -> Tensor:
    """Keep the fewest most likely tokens that hold `mass` of the probability; the most likely one always stays."""
    probabilities = torch.softmax(scores, dim=-1)
    # tokens below this hold less than 1 - mass together: cutting them off first avoids a full sort
    candidates = (probabilities > (1 - mass) / len(scores)).nonzero()[:, 0]
    ordered, order = probabilities[candidates].sort(descending=True, stable=True)
    kept_first = ordered.cumsum(0) - ordered < mass
    kept_first[:1] = True  # also for a `mass` that float32 rounds to 0
    kept = candidates[order[kept_first]]
    return torch.full_like(scores, -math.inf).index_copy_(0, kept, scores[kept])


def sample(logits: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> list[int]:
    """Choose the token of each of R sequences from `logits` [R, V] float32; `positions`: [R], positions of these tokens."""
    scores = _processed(logits, samplers)
    drawing = [sampler.request.temperature > 0 for sampler in samplers]
    if not any(drawing):
        greedy: list[int] = argmax(scores).tolist()
        return greedy
    keys = [_key(sampler, position) for sampler, position in zip(samplers, positions, strict=True)]
    if ops.supports_sample_tokens(scores):
        words = torch.tensor(keys, dtype=torch.int32)
        drawn: list[int] = ops.sample_tokens(scores, words, torch.tensor(drawing)).tolist()
        return drawn
    noise = gumbel(keys, torch.arange(scores.shape[1], device=scores.device))
    warm = torch.tensor(drawing, device=scores.device)[:, None]
    everything: list[int] = argmax(scores + torch.where(warm, noise, 0.0)).tolist()
    return everything


def _processed(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Scores [R, V] by which each sequence chooses. Where they only have temperatures, all are divided together."""
    requests = [sampler.request for sampler in samplers]
    if any(request.penalised or request.truncated for request in requests):
        return torch.stack([sampler.process(row) for row, sampler in zip(logits, samplers, strict=True)])
    if any(request.temperature not in (0.0, 1.0) for request in requests):
        return logits / torch.tensor([request.temperature or 1.0 for request in requests], device=logits.device)[:, None]
    return logits


def _key(sampler: Sampler, position: int) -> tuple[int, int]:
    return position_key(sampler.request.seed, position, sampler.request.choice)


def rank_scores(logits: Tensor, positions: Sequence[int], samplers: Sequence[Sampler], ids: Tensor,
                whose: Tensor | None = None) -> Tensor:
    """Scores by which drafters rank candidates: logits / temperature + the noise of the coming draw; greedy: the logits.

    `logits`: [B, S, n] over token `ids` [n]; `positions`: [B], position of each sequence's candidates; `whose`: [P] int64, the
    sequence of each row of `logits` [P, S, n], where a sequence may have several rows or none.
    """
    temperatures = [sampler.request.temperature for sampler in samplers]
    if not any(temperatures):
        return logits
    noise = gumbel([_key(sampler, position) for sampler, position in zip(samplers, positions, strict=True)], ids)
    warm = torch.tensor([temperature > 0 for temperature in temperatures], device=logits.device)[:, None]
    scale = torch.tensor([temperature or 1.0 for temperature in temperatures], device=logits.device)[:, None, None]
    noise = torch.where(warm, noise, 0.0)
    if whose is not None:
        noise, scale = noise[whose], scale[whose]
    return logits / scale + noise[:, None]


def token_logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Log probabilities at `logits` [V] of `token` and of the `count` most probable tokens."""
    values = torch.log_softmax(logits.float(), dim=-1)
    best = values.topk(min(count, len(values)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(values[token]), top)
