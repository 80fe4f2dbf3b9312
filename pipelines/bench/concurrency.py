"""The load of `bench`: so many requests kept in flight on one engine, a new one sent when one ends; as clients see it."""

from __future__ import annotations

import gc
import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import Engine, Result
from hydra_core.errors import InputError
from hydra_core.proposers import Drafter
from hydra_core.sampling import Request
from hydra_core.tree import TreeSet
from pipelines.bench.plan import FOREIGN, PLAIN, BenchPlan, Question, append_row, make_drafter, read_lines, room_for

WARM_UP_TOKENS = 8
TIMES_THE_LEVEL, FEWEST_REQUESTS = 4, 16
"""Requests of a level where no count is asked for: so many times the level, so that its last ones, which have the engine
more and more to themselves, are few; and never fewer than that."""


@dataclass(frozen=True)
class LoadRow:
    """One contender at one level in one round.

    `level`: requests in flight; `tokens`: up to each answer's end; `seconds`: from the first request's sending to the last
    one's end; `steps`: base forwards over drafts, and `row_steps` the rows they held, summed; `first_token`, `between`:
    50th and 99th percentile in seconds, see `Seen` (`between` None where no answer has a second token); `answers`: a digest
    of the token ids of each, in the requests' order.
    """

    round: int
    level: int
    method: str
    tokens: int
    seconds: float
    steps: int
    row_steps: int
    first_token: tuple[float, float]
    between: tuple[float, float] | None
    answers: tuple[str, ...]


@dataclass
class Seen:
    """What clients saw of a load, in seconds of wall time.

    `first_token`: of each request, from its sending to the end of the step that brought its first token; `between`: of each
    later token, from the one before it: k tokens that a step brings at once, dt after the last ones, came dt / k apart.
    Tokens of the same step as the first one have no time of their own and are left out.
    """

    results: dict[str, Result] = field(default_factory=dict)
    seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def read_load(path: Path) -> list[LoadRow]:
    """Rows written so far; a line cut short by a kill is left out."""
    return [LoadRow(**values | {"first_token": tuple(values["first_token"]), "answers": tuple(values["answers"]),
                                "between": values["between"] and tuple(values["between"])}) for values in read_lines(path)]


def check_load(plan: BenchPlan, questions: Sequence[Question]) -> None:
    """Raise InputError when the caches of the largest level do not fit the memory: told before anything is timed."""
    if not _todo(plan):
        return
    base = _load_base(plan)
    for method in _methods(plan):
        _engine(method, max(plan.concurrency), make_drafter(method, plan, base, measured=False), plan, base, questions)
        _let_go(base)


def measure_load(plan: BenchPlan, questions: Sequence[Question]) -> None:
    """Every contender at every level, taking turns; what stands already is not run again.

    One engine stands at a time: a large level may leave room for no second one. Each starts knowing nothing of what its
    drafts are worth.
    """
    if not (todo := _todo(plan)):
        return
    base = _load_base(plan)
    drafters = {method: make_drafter(method, plan, base) for method in _methods(plan)}
    for number, level, method in todo:
        requests = make_requests(questions, plan.concurrency_requests or _usual_requests(level), plan)
        row = LoadRow(number, level, method, *_measure(_engine(method, level, drafters[method], plan, base, questions),
                                                       requests, level))
        _let_go(base)
        append_row(Path(plan.load_file), row)
        print(f"bench: load, {level} at once, {method}: {row.tokens / row.seconds:.0f} tokens/s", file=sys.stderr, flush=True)


def make_requests(questions: Sequence[Question], count: int, plan: BenchPlan) -> list[Request]:
    """`count` requests: all questions as often as they go into it, and for the rest some from all over the list; in an order
    that mixes categories and is the same for every contender and level."""
    whole, rest = divmod(count, len(questions))
    chosen = [*questions] * whole + [questions[place * len(questions) // rest] for place in range(rest)]
    random.Random(0).shuffle(chosen)
    return [Request(f"{place} {question.id}", question.prompt_ids, plan.max_new_tokens, plan.temperature)
            for place, question in enumerate(chosen)]


def drive(engine: Engine, requests: Sequence[Request], level: int,
          clock: Callable[[], float] = time.perf_counter) -> Seen:
    """Keep `level` requests in flight until all of them are done; `clock` tells seconds.

    Raises InputError for a request that cannot be decoded.
    """
    source, seen = iter(requests), Seen()
    sent: dict[str, float] = {}
    latest: dict[str, float] = {}
    began = clock()
    while True:
        while len(sent) - len(seen.results) < level and (request := next(source, None)) is not None:
            sent[request.id] = clock()
            engine.add(request)
        if not engine.has_work:
            break
        outputs, now = engine.step(), clock()
        new = Counter[str]()
        for output in outputs:
            new[output.id] += len(output.token_ids)
            if output.result is not None:
                seen.results[output.id] = output.result
        for name, tokens in new.items():
            if name in latest:
                seen.between += [(now - latest[name]) / tokens] * tokens
            else:
                seen.first_token.append(now - sent[name])
            latest[name] = now
    seen.seconds = clock() - began
    return seen


def summarise_load(rows: Sequence[LoadRow]) -> dict[str, Any]:
    """Level -> method -> figures.

    `tokens_per_second`: all rounds pooled; `speed_vs_plain`: its ratio to plain's at the same level in the same round,
    median over rounds, and their `range`; `*_ms`: percentiles of each round, median over rounds; `rows_running`: rows of a
    mean step; `tokens_per_step`: of one row; `identical`: share of answers equal to plain's by token ids.
    """
    plain = {(row.round, row.level): row for row in rows if row.method == PLAIN}
    figures: dict[str, Any] = {}
    for level, method in dict.fromkeys((row.level, row.method) for row in sorted(rows, key=lambda row: row.level)):
        own = [row for row in rows if (row.level, row.method) == (level, method)]
        pairs = [(row, plain[row.round, level]) for row in own if (row.round, level) in plain]
        ratios = [(row.tokens / row.seconds) / (other.tokens / other.seconds) for row, other in pairs]
        equal = [one == another for row, other in pairs for one, another in zip(row.answers, other.answers, strict=True)]
        steps, row_steps = (sum(getattr(row, name) for row in own) for name in ("steps", "row_steps"))
        later = sum(row.tokens - len(row.answers) for row in own)
        figures.setdefault(str(level), {})[method] = {
            "rounds": len(own), "requests": sum(len(row.answers) for row in own), "tokens": sum(row.tokens for row in own),
            "tokens_per_second": round(sum(row.tokens for row in own) / sum(row.seconds for row in own), 1),
            "speed_vs_plain": round(float(np.median(ratios)), 3) if ratios else None,
            "range": [round(min(ratios), 3), round(max(ratios), 3)] if ratios else None,
            **_milliseconds("first_token", [row.first_token for row in own]),
            **_milliseconds("between_tokens", [row.between for row in own if row.between]),
            "rows_running": round(row_steps / steps, 2) if steps else None,
            "tokens_per_step": round(later / row_steps, 3) if row_steps else None,
            "identical": round(sum(equal) / len(equal), 3) if equal else None}
    return figures


def _milliseconds(name: str, rounds: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    middle = np.median(np.array(rounds), axis=0) if rounds else None
    return {f"{name}_{share}_ms": None if middle is None else round(1000 * float(middle[place]), 1)
            for place, share in enumerate(("p50", "p99"))}


# -- parts of a measurement --------------------------------------------------------------------------------------------

def _methods(plan: BenchPlan) -> tuple[str, ...]:
    """Contenders that are an engine's."""
    return tuple(method for method in plan.methods if method not in FOREIGN)


def _todo(plan: BenchPlan) -> list[tuple[int, int, str]]:
    """(Round, level, method) still to be run; contenders take turns at being first."""
    done = {(row.round, row.level, row.method) for row in read_load(Path(plan.load_file))}
    methods, levels = _methods(plan), tuple(dict.fromkeys(plan.concurrency))
    turns = [(number, level, (number + place) % len(methods)) for number in range(plan.rounds)
             for place, level in enumerate(levels)]
    return [(number, level, method) for number, level, shift in turns for method in methods[shift:] + methods[:shift]
            if (number, level, method) not in done]


def _usual_requests(level: int) -> int:
    return max(FEWEST_REQUESTS, TIMES_THE_LEVEL * level)


def _load_base(plan: BenchPlan) -> Base:
    return load_base(plan.base.model, dtype=plan.base.dtype, device=plan.base.device, cache=Path(plan.cache),
                     context_limit=plan.base.context_limit)


def _engine(method: str, level: int, drafter: tuple[Drafter | None, TreeSet | None], plan: BenchPlan, base: Base,
            questions: Sequence[Question]) -> Engine:
    """An engine of `level` rows. Raises InputError when it does not fit the memory."""
    limit = room_for(base, plan.max_new_tokens, questions)
    try:
        return Engine(base, *drafter, max_batch_size=level, context_limit=limit, shared_noise=plan.shared_noise)
    except InputError as error:
        raise InputError(f"bench.concurrency: {level} requests at once with {method}: {error}") from None


def _let_go(base: Base) -> None:
    """Give back the memory of an engine that nobody holds any more: the next one asks how much is free."""
    gc.collect()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(engine: Engine, requests: Sequence[Request], level: int) -> tuple[Any, ...]:
    """The figures of a `LoadRow`, after a warm-up."""
    engine.generate([replace(request, max_new_tokens=min(WARM_UP_TOKENS, request.max_new_tokens))
                     for request in requests[:level]])
    before = engine.times.steps
    seen = drive(engine, requests, level)
    results = [seen.results[request.id] for request in requests]
    return (sum(len(result.token_ids) for result in results), seen.seconds, engine.times.steps - before,
            sum(result.steps for result in results), _percentiles(seen.first_token), _percentiles(seen.between),
            tuple(hashlib.sha256(str(result.token_ids).encode()).hexdigest()[:16] for result in results))


def _percentiles(times: Sequence[float]) -> tuple[float, float] | None:
    return (float(np.percentile(times, 50)), float(np.percentile(times, 99))) if times else None
