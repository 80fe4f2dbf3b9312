"""Our requests as vLLM takes them. What vLLM does not have, or does otherwise, is refused by name."""

from __future__ import annotations

import hashlib
from typing import Any

from hydra_core.errors import InputError
from hydra_core.sampling.request import Request

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0
"""vLLM raises a temperature below the first one to it, without an error, and refuses one above the second."""
MOST_PENALTY = 2.0
"""Of presence and frequency penalties, in either direction."""


def sampling_of(request: Request, stop_ids: tuple[int, ...], drafts: bool, on_cpu: bool) -> dict[str, Any]:
    """The arguments of vLLM's `SamplingParams` for a request that `Request.check` accepts.

    `stop_ids`: of the base; `drafts`: whether vLLM verifies drafts; `on_cpu`: its build for CPUs. Stop strings are not among
    them: `VllmEngine` looks for them in the text as our own engine decodes it. Raises InputError that names the field.
    """
    for field, wrong, why in _unsupported(request, drafts, on_cpu):
        if wrong:
            raise InputError(f"request {request.id}: {field}: {why}")
    sampled = request.temperature > 0
    return {
        "temperature": float(request.temperature), "seed": seed_of(request) if sampled else None,
        "max_tokens": request.max_new_tokens, "top_k": request.top_k if sampled else 0,
        "top_p": float(request.top_p) if sampled else 1.0, "min_p": float(request.min_p) if sampled else 0.0,
        "repetition_penalty": float(request.repetition_penalty), "presence_penalty": float(request.presence_penalty),
        "frequency_penalty": float(request.frequency_penalty), "logprobs": request.logprobs,
        # vLLM's own end of text is its tokenizer's alone: ours are told token by token
        "ignore_eos": True, "stop_token_ids": list(stop_ids if request.stop_ids is None else request.stop_ids),
        "detokenize": False,
    }


def seed_of(request: Request) -> int:
    """A seed for vLLM, in 63 bits: each choice of a request has one of its own, and none is -1, which vLLM takes for none."""
    text = f"{request.seed}/{request.choice}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _unsupported(request: Request, drafts: bool, on_cpu: bool) -> list[tuple[str, bool, str]]:
    """Fields of the request, whether vLLM cannot do what they ask for, and why not."""
    temperature, sampled = request.temperature, request.temperature > 0
    return [
        ("speculative", request.lossy_typical is not None, "vLLM has no typical acceptance: leave it out"),
        ("speculative", not request.speculate and drafts, "vLLM drafts for all requests or for none: leave it out"),
        ("hidden_states", request.hidden_states, "vLLM returns none: compute them with the base"),
        ("temperature", sampled and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE,
         f"vLLM takes 0 or {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, got {temperature:g}"),
        ("temperature", sampled and drafts and on_cpu,
         "vLLM on a CPU cannot sample where drafts are verified: decode without heads, or on a GPU"),
        ("min_p", sampled and request.min_p > 0 and drafts, "vLLM has none where drafts are verified: decode without heads"),
        *((name, abs(getattr(request, name)) > MOST_PENALTY, f"vLLM takes -{MOST_PENALTY:g} to {MOST_PENALTY:g}")
          for name in ("presence_penalty", "frequency_penalty")),
    ]
