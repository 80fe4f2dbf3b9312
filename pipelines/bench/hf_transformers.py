"""transformers as a contender of `bench`: its own model on the same folder and weight format, through its own `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hydra_core.base import Base, resolve_base
from hydra_core.base.formats import DTYPES, quantised_by
from hydra_core.sampling import Request
from pipelines.bench.plan import BenchPlan, Outcome


def transformers_model(plan: BenchPlan, base: Base) -> Any:
    """transformers' model with greedy `generate`.

    A generation config beside the weights may hold penalties and suppressed tokens, which no other contender applies: it is
    replaced.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = resolve_base(plan.base.model, Path(plan.cache)).folder
    quantised = quantised_by(base.vocabulary.config) is not None
    place: dict[str, Any] = {"device_map": {"": base.device}} if quantised else {}  # such a model cannot be moved afterwards
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[plan.base.dtype], use_safetensors=True,
                                                      trust_remote_code=False, **place)
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0,
                                               eos_token_id=list(base.stop_ids) or None)
    return (model if quantised else model.to(base.device)).eval()


def single_contender(plan: BenchPlan, base: Base, lookup: int | None) -> Callable[[tuple[int, ...], int], Outcome]:
    """One prompt at a time, greedy. It stops at the context limit, where transformers would continue.

    `lookup`: number of tokens that transformers' prompt lookup drafts, None: no drafts.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    model = transformers_model(plan, base)

    class FirstToken(StoppingCriteria):
        """Never stops; records when the first token is complete."""

        at = 0.0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            self.at = self.at or time.perf_counter()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    steps = 0

    def counted(*_: Any) -> None:
        nonlocal steps
        steps += 1

    model.register_forward_hook(counted)
    drafting = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}

    def run(prompt_ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
        nonlocal steps
        steps = 0
        ids = torch.tensor([prompt_ids], device=base.device)
        clock = FirstToken()
        synchronize(base)
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([clock]),
                                    max_new_tokens=min(max_new_tokens, base.context_limit - ids.shape[1]), **drafting)
        tokens = tuple(output[0, ids.shape[1]:].tolist())
        ended = time.perf_counter()
        return Outcome(token_ids=tokens, steps=steps - 1, prefill_seconds=clock.at - started, decode_seconds=ended - clock.at)

    return run


def batch_contender(plan: BenchPlan, base: Base) -> Callable[[list[Request]], int]:
    """Left-padded batches of `plan.max_batch_size` prompts; each batch runs until its longest answer is complete.

    The returned function gives the number of tokens up to the end of each answer.
    """
    model = transformers_model(plan, base)
    stops = set(base.stop_ids)

    def run(requests: list[Request]) -> int:
        tokens = 0
        for start in range(0, len(requests), plan.max_batch_size):
            batch = requests[start:start + plan.max_batch_size]
            longest = max(len(request.prompt_ids) for request in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, request in enumerate(batch):
                ids[row, -len(request.prompt_ids):] = torch.tensor(request.prompt_ids)
                mask[row, -len(request.prompt_ids):] = 1
            with torch.inference_mode():
                output = model.generate(ids.to(base.device), attention_mask=mask.to(base.device),
                                        max_new_tokens=max(request.max_new_tokens for request in batch))
            for request, row_ids in zip(batch, output[:, longest:].tolist(), strict=True):
                tokens += _length(row_ids[:request.max_new_tokens], stops)
        return tokens

    return run


def synchronize(base: Base) -> None:
    """Wait until the GPU has finished earlier work, so that it is not part of the next measurement."""
    if base.device.type == "cuda":
        torch.cuda.synchronize()


def _length(tokens: Sequence[int], stops: set[int]) -> int:
    """Number of tokens up to and including the stop token."""
    return next((place for place, token in enumerate(tokens, start=1) if token in stops), len(tokens))
