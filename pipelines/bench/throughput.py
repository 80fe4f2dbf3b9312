"""The throughput of `bench`: many prompts through a running batch against transformers' padded batches."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import Engine, load_heads
from hydra_core.sampling import Request
from pipelines.batch import reader as batch_rows
from pipelines.batch.backends import RequestSettings
from pipelines.batch.worker import BatchSettings, BatchWorker
from pipelines.batch.writer import BATCH, Output, deduplicate
from pipelines.bench.plan import (
    LLAMA,
    LOOKUP,
    TRANSFORMERS,
    BenchPlan,
    Question,
    append_row,
    make_drafter,
    read_lines,
    room_for,
    transformers_model,
)
from pipelines.profiling.cost_cache import machine_costs
from pipelines.serve.messages import AppArgs

ENGINE, BATCH_JOB = "engine", "batch"
"""What `batch` decodes with, called directly, and as the job does it: rows from and to files, one engine in the process."""
LIMITS = (16, 400)
"""Between these the answers' limits are drawn in the ragged workload."""


@dataclass(frozen=True)
class BatchRow:
    """One contender on one workload in one round: `equal` limits or `ragged` ones; `tokens` up to each row's end."""

    round: int
    workload: str
    method: str
    prompts: int
    tokens: int
    seconds: float


def read_batches(path: Path) -> list[BatchRow]:
    return [BatchRow(**values) for values in read_lines(path)]


def measure_batches(plan: BenchPlan, questions: list[Question]) -> None:
    """Every contender on both workloads, taking turns; what stands already is not run again."""
    chosen, methods = questions[:plan.batch_prompts], tuple(method for method in plan.methods if method not in (LOOKUP, LLAMA))
    if not chosen:
        return
    names = (*methods, *((ENGINE, BATCH_JOB) if plan.batch_app else ()))
    path = Path(plan.batch_file)
    done = {(row.round, row.workload, row.method) for row in read_batches(path)}
    todo = [(number, workload, method) for number in range(plan.rounds) for workload in plan.batch_limits
            for method in _turned(names, number) if (number, workload, method) not in done]
    if not todo:
        return
    base = load_base(plan.base.model, dtype=plan.base.dtype, device=plan.base.device, cache=Path(plan.cache),
                     context_limit=plan.base.context_limit)
    contenders = {method: _contender(method, plan, base, chosen) for method in methods}
    contenders |= {} if plan.batch_app is None else _batch_contenders(plan, plan.batch_app, base, chosen)
    for run in contenders.values():
        run([Request(question.id, question.prompt_ids, 4) for question in chosen[:plan.max_batch_size]])
    for number, workload, method in todo:
        requests = make_requests(chosen, workload, plan.max_new_tokens, base.context_limit)
        began = time.perf_counter()
        tokens = contenders[method](requests)
        row = BatchRow(number, workload, method, len(chosen), tokens, time.perf_counter() - began)
        append_row(path, row)
        print(f"bench: batch, {workload} limits, {method}: {tokens / row.seconds:.0f} tokens/s", file=sys.stderr, flush=True)


def make_requests(questions: Sequence[Question], workload: str, max_new_tokens: int, context_limit: int) -> list[Request]:
    """Greedy requests; ragged limits depend on a question's place alone. None exceeds what the context has room for, as
    transformers would go on beyond it."""
    room = context_limit - max(len(question.prompt_ids) for question in questions)
    dice = random.Random(0)
    limits = [dice.randint(*LIMITS) if workload == "ragged" else max_new_tokens for _ in questions]
    return [Request(question.id, question.prompt_ids, min(limit, room))
            for question, limit in zip(questions, limits, strict=True)]


def _turned(methods: tuple[str, ...], number: int) -> tuple[str, ...]:
    shift = number % len(methods)
    return methods[shift:] + methods[:shift]


def _contender(method: str, plan: BenchPlan, base: Base, questions: list[Question]) -> Callable[[list[Request]], int]:
    if method == TRANSFORMERS:
        return _transformers(plan, base)
    limit = room_for(base, max(plan.max_new_tokens, LIMITS[1]), questions)
    engine = Engine(base, *make_drafter(method, plan, base), max_batch_size=plan.max_batch_size, context_limit=limit)
    return lambda requests: sum(len(result.token_ids) for result in engine.generate(requests))


def _batch_contenders(plan: BenchPlan, app: AppArgs, base: Base,
                      questions: list[Question]) -> dict[str, Callable[[list[Request]], int]]:
    """The same configuration twice: its engine called directly, and driven by the worker of `batch`."""
    limit = room_for(base, max(plan.max_new_tokens, LIMITS[1]), questions)
    app = replace(app, base=app.base | {"context_limit": limit}, max_batch_size=plan.max_batch_size,
                  max_queued=2 * plan.max_batch_size, threads=plan.threads)
    costs = partial(machine_costs, base, Path(plan.cache))
    heads = load_heads(app.configuration, base, costs) if app.configuration else (None, None)
    engine = Engine(base, *heads, max_batch_size=plan.max_batch_size, context_limit=limit)
    request_settings = RequestSettings("bench", plan.max_new_tokens, 0.0, 0, embedded=app)
    output = Output(tempfile.gettempdir(), "openai", app.label, 64)
    worker = BatchWorker(BatchSettings(output, request_settings, 2 * plan.max_batch_size))
    return {ENGINE: lambda requests: sum(len(result.token_ids) for result in engine.generate(requests)),
            BATCH_JOB: partial(_as_batch, worker)}


def _as_batch(worker: BatchWorker, requests: list[Request]) -> int:
    """Rows in the order in which `batch` asks them, answers to files; returns their tokens."""
    rows = (batch_rows.BatchRow(request.id, number, url=batch_rows.URLS[1], body={
        "prompt": list(request.prompt_ids), "max_tokens": request.max_new_tokens, "temperature": 0.0})
        for number, request in enumerate(requests, start=1))
    with tempfile.TemporaryDirectory() as folder:
        output = replace(worker.settings.output, folder=folder)
        worker.writer.output = output
        worker.answer(batch_rows.ordered(rows))
        found = deduplicate(output.rows, output.kind, BATCH)
        if len(found.ids) != len(requests):
            raise RuntimeError(f"bench: batch answered {len(found.ids)} of {len(requests)} rows")
        return found.tokens


def _transformers(plan: BenchPlan, base: Base) -> Callable[[list[Request]], int]:
    """`generate` on left-padded batches, each of which runs until its longest row is done."""
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


def _length(tokens: Sequence[int], stops: set[int]) -> int:
    """Tokens up to the stop token, which counts."""
    return next((place for place, token in enumerate(tokens, start=1) if token in stops), len(tokens))


def summarise_batches(rows: list[BatchRow]) -> dict[str, Any]:
    """workload -> method -> tokens per second, its ratio to transformers in the same round (median), and the range; of the
    batch job also that to its engine."""
    figures: dict[str, Any] = {}
    for workload in dict.fromkeys(row.workload for row in rows):
        own = [row for row in rows if row.workload == workload]
        rates = {(row.round, row.method): row.tokens / row.seconds for row in own}
        figures[workload] = {}
        for method in dict.fromkeys(row.method for row in own):
            ratios = sorted(rate / rates[number, TRANSFORMERS] for (number, name), rate in rates.items()
                            if name == method and (number, TRANSFORMERS) in rates)
            mean = [rate for (_, name), rate in rates.items() if name == method]
            direct = sorted(rate / rates[number, ENGINE] for (number, name), rate in rates.items()
                            if name == method == BATCH_JOB and (number, ENGINE) in rates)
            figures[workload][method] = {
                "prompts": max(row.prompts for row in own),
                "tokens": sum(row.tokens for row in own if row.method == method),
                "tokens_per_second": round(sum(mean) / len(mean), 1),
                "speed_vs_transformers": round(ratios[len(ratios) // 2], 3) if ratios else None,
                "range": [round(ratios[0], 3), round(ratios[-1], 3)] if ratios else None,
                **({"speed_vs_engine": round(direct[len(direct) // 2], 3)} if direct else {})}
    return figures
