"""`generate`: answers to a few prompts in this process, written as they are decoded; without Ray, without a server."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch

from hydra_core.decoding import Engine, check_heads, load_heads
from hydra_core.decoding.text import TextStream
from hydra_core.errors import InputError
from hydra_core.sampling import Request
from pipelines.config import RunConfig
from pipelines.profiling.cost_cache import costs_of_one
from pipelines.runtime.artifacts import RunPaths, StageResult
from pipelines.runtime.console import say
from pipelines.tracking.lookup import find_model


def run_generate(config: RunConfig) -> StageResult:
    """Answer `generate.prompts` one after the other. The text goes to stderr while it is decoded.

    Raises InputError for no prompt, one that does not fit the context, and a model that is not available.
    """
    section, cache = config.generate, RunPaths.of(config).cache
    prompts = _prompts(section.prompts)
    model = find_model(config, section.model, "generate.model")
    if section.threads is not None:
        torch.set_num_threads(section.threads)
    base = config.base.load(cache)
    if model.folder is not None:
        check_heads(model.folder, base.vocabulary)
    requests = [Request(str(number), tuple(base.encode_prompt(prompt)), section.max_new_tokens, section.temperature, section.seed,
                        choice=number)  # equal prompts get different samples
                for number, prompt in enumerate(prompts)]
    for request in requests:
        request.check(base.vocab_size, base.context_limit)
    drafter, trees = load_heads(model.folder, base, partial(costs_of_one, base, cache)) if model.folder else (None, None)
    room = min(base.context_limit, max(len(request.prompt_ids) for request in requests) + section.max_new_tokens)
    engine = Engine(base, drafter, trees, max_batch_size=1, context_limit=room)
    say("generate", f"{model.label} drafts for {base.identity}")
    answers = [_answer(engine, request) for request in requests]
    return StageResult("generate", None, {}, {"answers": answers, "model": model.label})


def _prompts(asked: tuple[str, ...]) -> tuple[str, ...]:
    prompts = asked or (sys.stdin.read().strip(),)
    if not all(prompt.strip() for prompt in prompts):
        raise InputError("generate.prompts: is empty: give a prompt in quotes, or text on standard input")
    return prompts


def _answer(engine: Engine, request: Request) -> dict[str, Any]:
    """Text and figures of one answer; its text also goes to stderr piece by piece."""
    text, result = TextStream(engine.base.decode, request.stop), None
    engine.add(request)
    while result is None:
        for output in engine.step():
            print(text.push(output.token_ids), end="", file=sys.stderr, flush=True)
            result = output.result
    print(text.finish(), file=sys.stderr)
    figures = {"new_tokens": len(result.token_ids), "finish_reason": result.finish_reason, "steps": result.steps,
               "tokens_per_step": round(result.tokens_per_step, 3) if result.steps else None,
               "tokens_per_second": round(result.tokens_per_second, 1) if result.steps else None}
    print(f"-- {figures['new_tokens']} tokens in {figures['steps']} steps, {figures['tokens_per_second']} tokens/s",
          file=sys.stderr, flush=True)
    return {"text": text.sent, **figures}
