"""The losslessness checks of `bench`: answers against the naive loop, and where answers differ from plain decoding's.

An answer that differs is compared in exact logits: at a near-tie two ways of summing choose differently, which is no loss. A base
that is loaded quantised has no exact form, one that is made 4-bit here is another in fp32, and a large one may not fit there:
such a base is checked in its own format. Where float64 does not fit, or cannot be had, the logits of the last position decide.

    proof.json    the format in which losslessness is shown, and why
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra_core.base import Base, pick_device, quantisation
from hydra_core.base.formats import LOSSY
from hydra_core.decoding import Engine, compare, naive_generate
from hydra_core.decoding.memory import free_bytes
from hydra_core.sampling import Request
from hydra_core.storage import as_path
from pipelines.bench.plan import (
    PLAIN,
    BenchPlan,
    Question,
    Row,
    append_row,
    is_foreign,
    read_lines,
    reference_of,
    requests_for,
    room_for,
    split_sweep,
)
from pipelines.bench.plan import make_drafter as drafter_of
from pipelines.bench.questions import prompt_of
from pipelines.bench.vllm_contender import VllmPool
from pipelines.config.bench import VLLM, is_vllm
from pipelines.runtime.console import say
from pipelines.runtime.files import write_text
from pipelines.sizing.base import shape_of

PROOF = "proof.json"
ROOM = 0.8
"""Share of the free memory that weights may take: the rest is for what is computed with them."""
ARRIVAL_STEPS = 3
"""Engine steps between two arrivals in the staggered batch."""


@dataclass(frozen=True)
class LosslessnessRow:
    """The verdict on one answer.

    `dtype`: the weight format; `rows`: size of the batch in which the answer was decoded and compared with the naive loop, 0
    for a timed answer, which is compared with plain's; what drafts in vLLM is compared with vLLM's own plain answers in both
    cases; `index`, `gap`: position of the first difference, and its size in logits; `turn`: of the question, from 0.
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
    """Give a verdict on every timed answer that differs from plain decoding's, or vLLM's (`reference_of`), in the run's weight
    format; once where several rounds differ."""
    if plan.temperature:
        return
    path = as_path(plan.losslessness_file)
    done = {(row.question, row.turn, row.method) for row in read_losslessness(path)
            if row.dtype == plan.base.dtype and row.rows == 0}
    asked = {question.id: question for question in questions}
    known = {(row.method, row.round, row.question, row.turn): row.token_ids for row in rows if row.method in (PLAIN, VLLM)}
    bases: tuple[Base, Base | None] | None = None
    for row in rows:
        key = (row.question, row.turn, row.method)
        reference = known[reference_of(row.method), row.round, row.question, row.turn]
        if key in done or row.token_ids == reference:
            continue
        base, exact = bases = bases or (plan.base.load(plan.cache), _exact(plan, plan.base.dtype))
        before = [known[PLAIN, row.round, row.question, turn] for turn in range(row.turn)]
        prompt = prompt_of(asked[row.question], before, base, base.context_limit)
        found = compare(base, prompt, reference, row.token_ids, exact)
        append_row(path, LosslessnessRow(row.question, row.method, plan.base.dtype, 0, found.verdict, found.index, found.gap,
                                     row.turn))
        done.add(key)


def check_losslessness(plan: BenchPlan, questions: list[Question]) -> None:
    """Compare each engine contender with the naive loop: greedy, in every format of the plan, alone and in a batch with
    staggered arrivals. Where losslessness is shown in the base's own format, that one is taken in place of fp32."""
    for dtype in _formats(plan):
        _check_format(plan, questions, dtype)


def check_vllm_losslessness(plan: BenchPlan, questions: list[Question]) -> None:
    """Compare what drafts in vLLM with vLLM alone, in the same formats, alone and in a batch. One vLLM is there at a time."""
    for dtype in _formats(plan):
        _check_vllm_format(plan, questions, dtype)


def _formats(plan: BenchPlan) -> tuple[str, ...]:
    """Weight formats in which losslessness is checked; none where it is not."""
    if not plan.identity_prompts:
        return ()
    proof, own = proof_of(plan), plan.base.dtype
    alone = proof["format"] == own and (quantisation(plan.base.model, cache=Path(plan.cache)) or own == LOSSY)
    formats = (own,) if alone else tuple(proof["format"] if dtype == "fp32" else dtype for dtype in plan.identity_formats)
    return tuple(dict.fromkeys(formats))


def proof_of(plan: BenchPlan) -> dict[str, str]:
    """`format`: in which losslessness is shown; `why`: it is not fp32, else empty. It is decided once for a bench, on the machine
    that measures, and kept beside the verdicts."""
    path = as_path(plan.losslessness_file).with_name(PROOF)
    if (known := read_proof(path)) is None:
        why = _why_own_format(plan)
        known = {"format": plan.base.dtype if why else "fp32", "why": why or ""}
        write_text(path, json.dumps(known))
        if why and plan.identity_prompts:
            say("bench", f"losslessness is shown in {plan.base.dtype}, the base's own format: {why}")
    return known


def read_proof(path: Path) -> dict[str, str] | None:
    """What `proof_of` wrote, None without a readable file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"format": str(found["format"]), "why": str(found["why"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _why_own_format(plan: BenchPlan) -> str | None:
    """Why answers in fp32 cannot show that this base's are kept; None where they can."""
    if method := quantisation(plan.base.model, cache=Path(plan.cache)):
        return f"it is quantised by {method}"
    if plan.base.dtype == LOSSY:
        return "its 4-bit codes are made here, and in fp32 it is another base"
    if plan.base.dtype == "fp32" or "fp32" not in plan.identity_formats:
        return None
    shape = shape_of(plan.base.model, plan.base.dtype, plan.base.context_limit, Path(plan.cache))
    needed, free = shape.weight_bytes("fp32"), free_bytes(pick_device(plan.base.device))
    if needed <= ROOM * free:
        return None
    return f"in fp32 its weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


def _check_format(plan: BenchPlan, questions: list[Question], dtype: str) -> None:
    path = as_path(plan.losslessness_file)
    done = _done(path, dtype)
    methods = [method for method in plan.methods if not is_foreign(method) and split_sweep(method, plan.heads)[1] is None]
    chosen = questions[:plan.identity_prompts]
    todo = _todo(plan, chosen, methods, done)
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


def _done(path: Path, dtype: str) -> set[tuple[str, str, int]]:
    """Question, contender and batch of the verdicts in this format."""
    return {(row.question, row.method, row.rows) for row in read_losslessness(path) if row.dtype == dtype and row.rows}


def _todo(plan: BenchPlan, chosen: list[Question], methods: list[str],
          done: set[tuple[str, str, int]]) -> list[tuple[str, int]]:
    """Contenders and sizes of batches that lack a verdict."""
    batches = [1] + [plan.identity_batch] * (plan.identity_batch > 1)
    return [(method, rows) for rows in batches for method in methods
            if any((question.id, method, rows) not in done for question in chosen)]


def _check_vllm_format(plan: BenchPlan, questions: list[Question], dtype: str) -> None:
    path = as_path(plan.losslessness_file)
    done, chosen = _done(path, dtype), questions[:plan.identity_prompts]
    todo = _todo(plan, chosen, [method for method in plan.methods if is_vllm(method) and method != VLLM], done)
    if not todo or dtype == "int4":  # which vLLM does not read
        return
    base = plan.base.load(plan.cache, dtype=dtype)
    requests = requests_for(chosen, plan.max_new_tokens)
    answers: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for method in dict.fromkeys((VLLM, *(method for method, _ in todo))):
        with VllmPool(plan, questions, dtype) as vllm:
            for rows in dict.fromkeys(rows for name, rows in todo if method in (VLLM, name)):
                found = vllm.answer(method, base, requests, rows)["tokens"]
                answers[method, rows] = [tuple(tokens) for tokens in found]
    exact: Base | None = None
    for method, rows in todo:
        pairs = list(zip(requests, answers[VLLM, rows], answers[method, rows], strict=True))
        for request, reference, answer in pairs:
            if (request.id, method, rows) in done:
                continue
            if answer != reference:
                exact = exact or _exact(plan, dtype)
            verdict = compare(base, request.prompt_ids, reference, answer, exact)
            append_row(path, LosslessnessRow(request.id, method, dtype, rows, verdict.verdict, verdict.index, verdict.gap))
        same = sum(answer == reference for _, reference, answer in pairs)
        say("bench", f"{dtype} losslessness, {method}, batch of {rows}: {same} of {len(requests)} answers are vLLM's own")


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
    """The same weights, computed in float64; None for a base that cannot be, or that does not fit."""
    if quantisation(plan.base.model, cache=Path(plan.cache)):
        return None
    shape = shape_of(plan.base.model, dtype, plan.base.context_limit, Path(plan.cache))
    needed, free = 2 * shape.weight_bytes("fp32"), free_bytes(pick_device(plan.base.device))
    if needed > ROOM * free:
        say("bench", f"in float64 the base's weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: answers that "
                     "differ are judged by the logits of the last position alone")
        return None
    return plan.base.load(plan.cache, dtype=dtype, widen=True)
