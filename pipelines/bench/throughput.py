"""The throughput part of `bench`: many prompts through continuous batching, against transformers' padded batches."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_core.base import Base
from hydra_core.decoding import Engine, load_heads
from hydra_core.sampling import Request
from hydra_core.storage import as_path
from pipelines.batch import reader as batch_rows
from pipelines.batch.backend import RequestSettings
from pipelines.batch.worker import BatchSettings, BatchWorker
from pipelines.batch.writer import BATCH, Output, deduplicate
from pipelines.bench.hf_transformers import batch_contender
from pipelines.bench.plan import (
    LIMITS,
    LLAMA,
    LOOKUP,
    TRANSFORMERS,
    BenchPlan,
    Question,
    append_row,
    make_drafter,
    read_lines,
    requests_for,
    room_for,
)
from pipelines.bench.vllm_contender import VllmPool
from pipelines.config.bench import is_vllm
from pipelines.profiling.cost_cache import machine_costs
from pipelines.runtime.console import say
from pipelines.serve.messages import AppArgs

ENGINE, BATCH_JOB = "engine", "batch"
"""The engine of `batch` called directly, and the `batch` job itself: rows from and to files, one engine in the process."""


@dataclass(frozen=True)
class BatchRow:
    """One contender on one workload (`equal` or `ragged` limits) in one round; `tokens`: up to the end of each answer."""

    round: int
    workload: str
    method: str
    prompts: int
    tokens: int
    seconds: float


def read_batches(path: Path) -> list[BatchRow]:
    return [BatchRow(**values) for values in read_lines(path)]


def measure_batches(plan: BenchPlan, questions: list[Question], vllm: VllmPool | None = None) -> None:
    """Every contender on both workloads, in turn; what the file already holds is not measured again."""
    chosen, methods = questions[:plan.batch_prompts], tuple(method for method in plan.methods if method not in (LOOKUP, LLAMA))
    if not chosen:
        return
    names = (*methods, *((ENGINE, BATCH_JOB) if plan.batch_app else ()))
    path = as_path(plan.batch_file)
    done = {(row.round, row.workload, row.method) for row in read_batches(path)}
    todo = [(number, workload, method) for number in range(plan.rounds) for workload in plan.batch_limits
            for method in _turned(names, number) if (number, workload, method) not in done]
    if not todo:
        return
    base = plan.base.load(plan.cache)
    contenders = {method: _contender(method, plan, base, chosen, vllm) for method in methods}
    contenders |= {} if plan.batch_app is None else _batch_contenders(plan, plan.batch_app, base, chosen)
    for run in contenders.values():
        run(requests_for(chosen[:plan.max_batch_size], 4))
    for number, workload, method in todo:
        requests = make_requests(chosen, workload, plan.max_new_tokens, base.context_limit)
        began = time.perf_counter()
        tokens = contenders[method](requests)
        row = BatchRow(number, workload, method, len(chosen), tokens, time.perf_counter() - began)
        append_row(path, row)
        say("bench", f"batch, {workload} limits, {method}: {tokens / row.seconds:.0f} tokens/s")


def make_requests(questions: Sequence[Question], workload: str, max_new_tokens: int, context_limit: int) -> list[Request]:
    """Greedy requests. Ragged limits depend on a question's position alone. None exceeds the context limit, beyond which
    transformers would continue."""
    room = context_limit - max(len(question.prompt_ids) for question in questions)
    dice = random.Random(0)
    limits = [dice.randint(*LIMITS) if workload == "ragged" else max_new_tokens for _ in questions]
    return requests_for(questions, [min(limit, room) for limit in limits])


def _turned(methods: tuple[str, ...], number: int) -> tuple[str, ...]:
    shift = number % len(methods)
    return methods[shift:] + methods[:shift]


def _contender(method: str, plan: BenchPlan, base: Base, questions: list[Question],
               vllm: VllmPool | None) -> Callable[[list[Request]], int]:
    if method == TRANSFORMERS:
        return batch_contender(plan, base)
    if is_vllm(method):
        assert vllm is not None
        return partial(vllm.batch, method, base)
    limit = room_for(base, max(plan.max_new_tokens, LIMITS[1]), questions)
    engine = Engine(base, *make_drafter(method, plan, base), max_batch_size=plan.max_batch_size, context_limit=limit)
    return partial(_as_engine, engine)


def _as_engine(engine: Engine, requests: list[Request]) -> int:
    """The number of tokens; nothing is drafted from the answers of an earlier round."""
    engine.forget_answers()
    return sum(len(result.token_ids) for result in engine.generate(requests))


def _batch_contenders(plan: BenchPlan, app: AppArgs, base: Base,
                      questions: list[Question]) -> dict[str, Callable[[list[Request]], int]]:
    """The same decoding configuration twice: its engine called directly, and through the worker of `batch`."""
    limit = room_for(base, max(plan.max_new_tokens, LIMITS[1]), questions)
    app = replace(app, base=app.base | {"context_limit": limit}, max_batch_size=plan.max_batch_size,
                  max_queued=2 * plan.max_batch_size, threads=plan.threads)
    costs = partial(machine_costs, base, Path(plan.cache))
    heads = load_heads(app.configuration, base, costs) if app.configuration else (None, None)
    engine = Engine(base, *heads, max_batch_size=plan.max_batch_size, context_limit=limit)
    request_settings = RequestSettings("bench", plan.max_new_tokens, 0.0, 0, embedded=app)
    output = Output(tempfile.gettempdir(), "openai", app.label, 64)
    worker = BatchWorker(BatchSettings(output, request_settings, 2 * plan.max_batch_size))
    return {ENGINE: partial(_as_engine, engine),
            BATCH_JOB: partial(_as_batch, worker)}


def _as_batch(worker: BatchWorker, requests: list[Request]) -> int:
    """Send rows in the order in which `batch` sends them and write the answers to files; returns the number of tokens."""
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


def summarise_batches(rows: list[BatchRow]) -> dict[str, Any]:
    """Workload -> method -> tokens per second, its ratio to transformers in the same round (median) and the range of that; for
    the batch job also the ratio to its engine."""
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
