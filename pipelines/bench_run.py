"""The measuring of `bench`: every contender on the same prompts in one process, taking turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import Engine, Request
from pipelines.bench_batch import measure_batches
from pipelines.bench_identity import check_differences, check_identity
from pipelines.bench_plan import (
    FOREIGN,
    LOOKUP,
    BenchPlan,
    Question,
    Row,
    append_row,
    make_drafter,
    read_rows,
    room_for,
    transformers_model,
)
from pipelines.quiet import speak

WARM_UP_TOKENS = 8

Contender = Callable[[Question, int], tuple[tuple[int, ...], int, int, int, float, float]]


def measure(plan: BenchPlan, questions: list[Question]) -> None:
    """Run what is still missing from the rows file, each row written at once, then identity and throughput."""
    speak()
    torch.set_num_threads(plan.threads)
    done = {(row.round, row.question, row.method) for row in read_rows(Path(plan.rows_file))}
    rounds = range(plan.rounds if plan.single else 0)
    todo = [(number, turn, question) for number in rounds for turn, question in enumerate(questions)
            if any((number, question.id, method) not in done for method in plan.methods)]
    if todo:
        contenders = _contenders(plan, questions)
        for run in contenders.values():
            run(questions[0], min(WARM_UP_TOKENS, plan.max_new_tokens))
        for count, (number, turn, question) in enumerate(todo, start=1):
            shift = (turn + number) % len(plan.methods)
            for method in plan.methods[shift:] + plan.methods[:shift]:  # nobody is always first
                if (number, question.id, method) not in done:
                    outcome = contenders[method](question, plan.max_new_tokens)
                    append_row(Path(plan.rows_file), Row(number, question.id, question.category, method, *outcome))
            print(f"bench: question {count}/{len(todo)}", file=sys.stderr, flush=True)
    check_differences(plan, questions, read_rows(Path(plan.rows_file)))
    check_identity(plan, questions)
    measure_batches(plan, questions)


# -- contenders --------------------------------------------------------------------------------------------------------

def _contenders(plan: BenchPlan, questions: list[Question]) -> dict[str, Contender]:
    base = load_base(plan.base.model, dtype=plan.base.dtype, device=plan.base.device, cache=Path(plan.cache),
                     context_limit=plan.base.context_limit)
    limit = room_for(base, plan.max_new_tokens, questions)
    made: dict[str, Contender] = {}
    for method in plan.methods:
        if method in FOREIGN:
            made[method] = _transformers(plan, base, plan.ngram[2] if method == LOOKUP else None)
        else:
            drafter, trees = make_drafter(method, plan, base)
            engine = Engine(base, drafter, trees, max_batch=1, context_limit=limit, shared_noise=plan.shared_noise)
            made[method] = _engine(engine, base, plan.temperature)
    return made


def _engine(engine: Engine, base: Base, temperature: float) -> Contender:
    def run(question: Question, max_new_tokens: int) -> tuple[tuple[int, ...], int, int, int, float, float]:
        _settle(base)
        result = engine.generate([Request(question.id, question.prompt_ids, max_new_tokens, temperature)])[0]
        return (result.token_ids, result.steps, result.drafted, result.accepted, result.prefill_seconds,
                result.decode_seconds)

    return run


def _transformers(plan: BenchPlan, base: Base, lookup: int | None) -> Contender:
    """transformers' own `generate`, greedy, as long as the context lasts: beyond it transformers would go on.

    `lookup`: tokens that its prompt lookup drafts, None for none.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    model = transformers_model(plan, base)

    class FirstToken(StoppingCriteria):
        """Never stops; notes when the first token stood."""

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

    def run(question: Question, max_new_tokens: int) -> tuple[tuple[int, ...], int, int, int, float, float]:
        nonlocal steps
        steps = 0
        ids = torch.tensor([question.prompt_ids], device=base.device)
        clock = FirstToken()
        _settle(base)
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([clock]),
                                    max_new_tokens=min(max_new_tokens, base.context_limit - ids.shape[1]), **drafting)
        tokens = tuple(output[0, ids.shape[1]:].tolist())
        ended = time.perf_counter()
        return tokens, steps - 1, 0, 0, clock.at - started, ended - clock.at

    return run


def _settle(base: Base) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize()
