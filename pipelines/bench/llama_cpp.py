"""llama.cpp as a contender of `bench`: the base's own GGUF file through llama-cpp-python, which is an extra.

    pip install 'hydra-heads[llama]'

It reads the same token ids, decodes greedily, stops at the same tokens and counts them as the other contenders do.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hydra_core.base import Base
from hydra_core.base.embedded import EMBEDDED_BASE, fetch_embedded
from hydra_core.errors import InputError
from pipelines.bench.plan import LLAMA, BenchPlan, Outcome

MODULE = "llama_cpp"


def check_llama(model: str) -> None:
    """Raise InputError unless llama.cpp can decode the base `model` here."""
    if model != EMBEDDED_BASE and Path(model).suffix != ".gguf":
        raise InputError(f"bench.methods: {LLAMA} reads a base that is a GGUF file, which base.model={model} is not: "
                         f"leave {LLAMA} out or set base.model to a .gguf file")
    if importlib.util.find_spec(MODULE) is None:
        raise InputError(f"bench.methods: {LLAMA} needs the package llama-cpp-python: pip install 'hydra-heads[llama]'")


def llama_contender(plan: BenchPlan, base: Base, room: int) -> Callable[[tuple[int, ...], int], Outcome]:
    """llama.cpp with `plan.threads` threads and a context of `room` tokens, in the file's own weight format. No prompt reuses
    the cache of an earlier one.

    Raises InputError where it cannot run.
    """
    model = plan.base.model
    check_llama(model)
    import llama_cpp

    file = fetch_embedded(Path(plan.cache)) if model == EMBEDDED_BASE else Path(model).expanduser()
    llm: Any = llama_cpp.Llama(str(file), n_ctx=room, n_threads=plan.threads, n_threads_batch=plan.threads,
                               n_gpu_layers=-1 if base.device.type == "cuda" else 0, logits_all=False, verbose=False)
    if (size := llm.n_vocab()) != base.vocab_size:
        raise InputError(f"bench.methods: {LLAMA}: {file} has {size} tokens, the base {base.vocab_size}")
    stops = set(base.stop_ids)

    def sample() -> int:
        """The argmax of the last evaluated position; the first one of equal logits, as in every other contender."""
        logits = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(base.vocab_size,)).argmax())

    def run(prompt_ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
        started = time.perf_counter()
        llm.reset()  # `eval` then drops the keys and values of the last prompt
        llm.eval(prompt_ids)
        tokens = [sample()]
        first = time.perf_counter()
        while tokens[-1] not in stops and len(tokens) < max_new_tokens:
            llm.eval(tokens[-1:])
            tokens.append(sample())
        return Outcome(token_ids=tuple(tokens), steps=len(tokens) - 1, prefill_seconds=first - started,
                       decode_seconds=time.perf_counter() - first)

    return run
