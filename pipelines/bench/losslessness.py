"""The losslessness checks of `bench`: answers against the naive loop, and where answers differ from plain decoding's.

An answer that differs is compared in exact logits: at a near-tie two ways of summing choose differently, which is no loss. A base
that is loaded quantised has no exact form, so it is checked and judged in its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra_core.base import Base, quantisation
from hydra_core.decoding import Engine, compare, naive_generate
from hydra_core.sampling import Request
from pipelines.bench.plan import (
    FOREIGN,
    PLAIN,
    BenchPlan,
    Question,
    Row,
    append_row,
    read_lines,
    requests_for,
    room_for,
    split_sweep,
)
from pipelines.bench.plan import make_drafter as drafter_of
from pipelines.bench.questions import prompt_of
from pipelines.runtime.console import say

ARRIVAL_STEPS = 3
"""Engine steps between two arrivals in the staggered batch."""


@dataclass(frozen=True)
class LosslessnessRow:
    """The verdict on one answer.

    `dtype`: the weight format; `rows`: size of the batch in which the answer was decoded and compared with the naive loop, 0
    for a timed answer, which is compared with plain's; `index`, `gap`: position of the first difference, and its size in
    logits; `turn`: of the question, from 0.
    """

    question: str
    method: str
    dtype: str
    rows: int
    verdict: str
    index: int | None = None
    gap: float | None = None
    turn: int = 0


def read_losslessness(path: Path) -> list[LosslessnessRow]:
    return [LosslessnessRow(**values) for values in read_lines(path)]


def check_differences(plan: BenchPlan, questions: list[Question], rows: list[Row]) -> None:
    """Give a verdict on every timed answer that differs from plain decoding's in the run's weight format; once where several
    rounds differ."""
    if plan.temperature:
        return
    path = Path(plan.losslessness_file)
    done = {(row.question, row.turn, row.method) for row in read_losslessness(path)
            if row.dtype == plan.base.dtype and row.rows == 0}
    asked = {question.id: question for question in questions}
    plain = {(row.round, row.question, row.turn): row.token_ids for row in rows if row.method == PLAIN}
    bases: tuple[Base, Base | None] | None = None
    for row in rows:
        key = (row.question, row.turn, row.method)
        if row.method == PLAIN or key in done or row.token_ids == plain[row.round, row.question, row.turn]:
            continue
        base, exact = bases = bases or (plan.base.load(plan.cache), _exact(plan, plan.base.dtype))
        before = [plain[row.round, row.question, turn] for turn in range(row.turn)]
        prompt = prompt_of(asked[row.question], before, base, base.context_limit)
        found = compare(base, prompt, plain[row.round, row.question, row.turn], row.token_ids, exact)
        append_row(path, LosslessnessRow(row.question, row.method, plan.base.dtype, 0, found.verdict, found.index, found.gap,
                                     row.turn))
        done.add(key)


def check_losslessness(plan: BenchPlan, questions: list[Question]) -> None:
    """Compare each engine contender with the naive loop: greedy, in every format of the plan, alone and in a batch with
    staggered arrivals. A quantised base is compared in its own format alone."""
    quantised = quantisation(plan.base.model, cache=Path(plan.cache))
    for dtype in (plan.base.dtype,) if quantised else plan.identity_formats:
        _check_format(plan, questions, dtype)


def _check_format(plan: BenchPlan, questions: list[Question], dtype: str) -> None:
    path = Path(plan.losslessness_file)
    done = {(row.question, row.method, row.rows) for row in read_losslessness(path) if row.dtype == dtype and row.rows}
    methods = [method for method in plan.methods if method not in FOREIGN and split_sweep(method, plan.heads)[1] is None]
    batches = [1] + [plan.identity_batch] * (plan.identity_batch > 1)
    chosen = questions[:plan.identity_prompts]
    todo = [(method, rows) for rows in batches for method in methods
            if any((question.id, method, rows) not in done for question in chosen)]
    if not todo:
        return
    base = plan.base.load(plan.cache, dtype=dtype)
    limit = room_for(base, plan.max_new_tokens, questions)
    requests = requests_for(chosen, plan.max_new_tokens)
    wanted = {}
    for count, request in enumerate(requests, start=1):
        wanted[request.id] = naive_generate(base, request, limit).token_ids
        say("bench", f"{dtype} losslessness, naive loop, prompt {count}/{len(requests)}")
    exact: Base | None = None
    for method, rows in todo:
        engine = Engine(base, *drafter_of(method, plan, base, measured=False), max_batch_size=rows, context_limit=limit)
        differing = 0
        for request_id, answer in _answers(engine, requests, rows):
            if (request_id, method, rows) in done:
                continue
            reference, prompt = wanted[request_id], next(r.prompt_ids for r in requests if r.id == request_id)
            if answer != reference:
                differing, exact = differing + 1, exact or _exact(plan, dtype)
            found = compare(base, prompt, reference, answer, exact)
            append_row(path, LosslessnessRow(request_id, method, dtype, rows, found.verdict, found.index, found.gap))
        say("bench", f"{dtype} losslessness, {method}, batch of {rows}: {len(requests) - differing} of {len(requests)} answers "
                     "are identical")


def _answers(engine: Engine, requests: list[Request], rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(Request id, token ids) of each answer: one request after another for a batch of one, else a new one every few steps."""
    if rows == 1:
        for request in requests:
            yield request.id, engine.generate([request])[0].token_ids
        return
    waiting, step = list(reversed(requests)), 0
    while waiting or engine.has_work:
        if waiting and step % ARRIVAL_STEPS == 0:
            engine.add(waiting.pop())
        step += 1
        for output in engine.step():
            if output.result is not None:
                yield output.id, output.result.token_ids


def _exact(plan: BenchPlan, dtype: str) -> Base | None:
    """The same weights, computed in float64; None for a base that cannot be."""
    if quantisation(plan.base.model, cache=Path(plan.cache)):
        return None
    return plan.base.load(plan.cache, dtype=dtype, widen=True)
