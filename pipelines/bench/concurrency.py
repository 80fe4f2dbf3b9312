"""The closed-loop part of `bench`: a fixed number of requests in flight on one engine, a new one sent when one ends.

The figures are those that clients see.
"""

from __future__ import annotations

import gc
import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hydra_core.base import Base
from hydra_core.decoding import Engine, Result
from hydra_core.errors import InputError
from hydra_core.proposers import Drafter
from hydra_core.sampling import Request
from hydra_core.storage import as_path
from hydra_core.tree import TreeSet
from pipelines.bench.plan import (
    PLAIN,
    BenchPlan,
    Question,
    append_row,
    is_foreign,
    make_drafter,
    read_lines,
    reference_of,
    requests_for,
    room_for,
)
from pipelines.bench.vllm_contender import VllmPool
from pipelines.config.bench import VLLM, is_vllm
from pipelines.runtime.console import say

WARM_UP_TOKENS = 8
REQUESTS_PER_SLOT, FEWEST_REQUESTS = 4, 16
"""Requests of a level where the settings give no number: a multiple of the level, so that the last ones, which share the
engine with fewer and fewer others, are a small part; and a minimum."""


@dataclass(frozen=True)
class ConcurrencyRow:
    """One contender at one level of concurrency in one round.

    `level`: requests in flight; `tokens`: up to the end of each answer; `seconds`: from sending the first request to the end
    of the last one; `steps`: base forwards after prefill, `row_steps`: the sequences in them, summed; `first_token`,
    `between`: 50th and 99th percentile in seconds, see `ClientTimes` (`between` None where no answer has a second token);
    `answers`: a digest of each answer's token ids, in the order of the requests.
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
class ClientTimes:
    """What the clients measured, in seconds of wall time.

    `first_token`: for each request, from sending it to the end of the step that produced its first token; `between`: for each
    later token, the time since the token before it. k tokens that one step produces, dt after the previous ones, count as
    k times dt / k. Tokens of the same step as the first one have no time of their own and are left out. `latest`: when each
    request got its latest token.
    """

    results: dict[str, Result] = field(default_factory=dict)
    seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    latest: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, tokens: int, sent: float, now: float) -> None:
        """A step that ended at `now` gave `tokens` to the request `name`, which was sent at `sent`."""
        if name in self.latest:
            self.between += [(now - self.latest[name]) / tokens] * tokens
        else:
            self.first_token.append(now - sent)
        self.latest[name] = now


def read_concurrency(path: Path) -> list[ConcurrencyRow]:
    """Rows written so far; a line that a kill cut short is left out."""
    return [ConcurrencyRow(**values | {"first_token": tuple(values["first_token"]), "answers": tuple(values["answers"]),
                                "between": values["between"] and tuple(values["between"])}) for values in read_lines(path)]


def check_concurrency(plan: BenchPlan, questions: Sequence[Question]) -> None:
    """Raise InputError when the caches of the highest level do not fit the memory, before anything is timed."""
    if not _todo(plan):
        return
    base = plan.base.load(plan.cache)
    for method in _own(plan):
        _engine(method, max(plan.concurrency), make_drafter(method, plan, base, measured=False), plan, base, questions)
        _free_memory(base)


def measure_concurrency(plan: BenchPlan, questions: Sequence[Question], vllm: VllmPool | None = None) -> None:
    """Every contender at every level, in turn; what the file already holds is not measured again.

    One engine of this process exists at a time, since a high level may leave no memory for a second one. Each starts without
    acceptance statistics.
    """
    if not (todo := _todo(plan)):
        return
    base = plan.base.load(plan.cache)
    drafters = {method: make_drafter(method, plan, base) for method in _own(plan)}
    for number, level, method in todo:
        requests = make_requests(questions, plan.concurrency_requests or _default_requests(level), plan)
        if is_vllm(method):
            assert vllm is not None
            figures = _measure_vllm(vllm, method, base, requests, level)
        else:
            figures = _measure(_engine(method, level, drafters[method], plan, base, questions), requests, level)
        row = ConcurrencyRow(number, level, method, *figures)
        _free_memory(base)
        append_row(as_path(plan.concurrency_file), row)
        say("bench", f"concurrency {level}, {method}: {row.tokens / row.seconds:.0f} tokens/s")


def make_requests(questions: Sequence[Question], count: int, plan: BenchPlan) -> list[Request]:
    """`count` requests: every question equally often, and for the remainder questions spread over the list. Their order mixes
    categories and is the same for every contender and level."""
    whole, rest = divmod(count, len(questions))
    chosen = [*questions] * whole + [questions[place * len(questions) // rest] for place in range(rest)]
    random.Random(0).shuffle(chosen)
    return requests_for(chosen, plan.max_new_tokens, plan.temperature, numbered=True)


def run_closed_loop(engine: Engine, requests: Sequence[Request], level: int,
          clock: Callable[[], float] = time.perf_counter) -> ClientTimes:
    """Keep `level` requests in flight until all `requests` are done; `clock` gives seconds.

    Raises InputError for a request that cannot be decoded.
    """
    source, seen = iter(requests), ClientTimes()
    sent: dict[str, float] = {}
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
            seen.add(name, tokens, sent[name], now)
    seen.seconds = clock() - began
    return seen


def summarise_concurrency(rows: Sequence[ConcurrencyRow]) -> dict[str, Any]:
    """Level -> method -> figures.

    `tokens_per_second`: all rounds pooled; `speed_vs_plain`: its ratio to plain's at the same level in the same round, as the
    median over rounds, with their `range`; `speed_vs_vllm`: likewise, where vLLM was measured; `*_ms`: percentiles of each
    round, median over rounds; `rows_running`: sequences in an average step; `tokens_per_step`: for one sequence; `identical`:
    share of answers with the same token ids as those of `reference_of`.
    """
    found = {(row.round, row.level, row.method): row for row in rows}
    figures: dict[str, Any] = {}
    for level, method in dict.fromkeys((row.level, row.method) for row in sorted(rows, key=lambda row: row.level)):
        own = [row for row in rows if (row.level, row.method) == (level, method)]
        pairs = {name: [(row, found[row.round, level, name]) for row in own if (row.round, level, name) in found]
                 for name in {PLAIN, VLLM, reference_of(method)}}
        ratios, vs_vllm = ([(row.tokens / row.seconds) / (other.tokens / other.seconds) for row, other in pairs[name]]
                           for name in (PLAIN, VLLM))
        equal = [one == another for row, other in pairs[reference_of(method)]
                 for one, another in zip(row.answers, other.answers, strict=True)]
        steps, row_steps = (sum(getattr(row, name) for row in own) for name in ("steps", "row_steps"))
        later = sum(row.tokens - len(row.answers) for row in own)
        figures.setdefault(str(level), {})[method] = {
            "rounds": len(own), "requests": sum(len(row.answers) for row in own), "tokens": sum(row.tokens for row in own),
            "tokens_per_second": round(sum(row.tokens for row in own) / sum(row.seconds for row in own), 1),
            "speed_vs_plain": round(float(np.median(ratios)), 3) if ratios else None,
            "range": [round(min(ratios), 3), round(max(ratios), 3)] if ratios else None,
            **({"speed_vs_vllm": round(float(np.median(vs_vllm)), 3)} if vs_vllm else {}),
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

def _own(plan: BenchPlan) -> tuple[str, ...]:
    """Contenders that use the engine."""
    return tuple(method for method in plan.methods if not is_foreign(method))


def _methods(plan: BenchPlan) -> tuple[str, ...]:
    """Contenders that take several requests at once: those of the engine, and vLLM's."""
    return tuple(method for method in plan.methods if not is_foreign(method) or is_vllm(method))


def _todo(plan: BenchPlan) -> list[tuple[int, int, str]]:
    """(Round, level, method) that are not measured yet; the first place rotates among contenders."""
    done = {(row.round, row.level, row.method) for row in read_concurrency(as_path(plan.concurrency_file))}
    methods, levels = _methods(plan), tuple(dict.fromkeys(plan.concurrency))
    turns = [(number, level, (number + place) % len(methods)) for number in range(plan.rounds)
             for place, level in enumerate(levels)]
    return [(number, level, method) for number, level, shift in turns for method in methods[shift:] + methods[:shift]
            if (number, level, method) not in done]


def _default_requests(level: int) -> int:
    return max(FEWEST_REQUESTS, REQUESTS_PER_SLOT * level)


def _engine(method: str, level: int, drafter: tuple[Drafter | None, TreeSet | None], plan: BenchPlan, base: Base,
            questions: Sequence[Question]) -> Engine:
    """An engine with `level` slots. Raises InputError when it does not fit the memory."""
    limit = room_for(base, plan.max_new_tokens, questions)
    try:
        return Engine(base, *drafter, max_batch_size=level, context_limit=limit, shared_noise=plan.shared_noise)
    except InputError as error:
        raise InputError(f"bench.concurrency: {level} requests at once with {method}: {error}") from None


def _free_memory(base: Base) -> None:
    """Free the memory of an engine that is no longer referenced: the next one checks how much is available."""
    gc.collect()
    if base.device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(engine: Engine, requests: Sequence[Request], level: int) -> tuple[Any, ...]:
    """The figures of a `ConcurrencyRow`, after a warm-up."""
    engine.generate([replace(request, max_new_tokens=min(WARM_UP_TOKENS, request.max_new_tokens))
                     for request in requests[:level]])
    engine.forget_answers()
    before = engine.times.steps
    seen = run_closed_loop(engine, requests, level)
    results = [seen.results[request.id] for request in requests]
    return (sum(len(result.token_ids) for result in results), seen.seconds, engine.times.steps - before,
            sum(result.steps for result in results), _percentiles(seen.first_token), _percentiles(seen.between),
            tuple(_digest(result.token_ids) for result in results))


def _measure_vllm(vllm: VllmPool, method: str, base: Base, requests: Sequence[Request], level: int) -> tuple[Any, ...]:
    """The same for vLLM, from the times that its process took."""
    vllm.answer(method, base, [replace(request, max_new_tokens=min(WARM_UP_TOKENS, request.max_new_tokens))
                               for request in requests[:level]], level)
    answer, seen, steps, row_steps = vllm.answer(method, base, requests, level), ClientTimes(), 0, 0
    for now, new in answer["events"]:
        later = sum(str(number) in seen.latest for number, _ in new)
        steps, row_steps = steps + bool(later), row_steps + later
        for number, tokens in new:
            seen.add(str(number), tokens, answer["sent"][number], now)
    return (sum(map(len, answer["tokens"])), answer["seconds"], steps, row_steps, _percentiles(seen.first_token),
            _percentiles(seen.between), tuple(_digest(tokens) for tokens in answer["tokens"]))


def _digest(tokens: Sequence[int]) -> str:
    """Of an answer's token ids."""
    return hashlib.sha256(str(tuple(tokens)).encode()).hexdigest()[:16]


def _percentiles(times: Sequence[float]) -> tuple[float, float] | None:
    return (float(np.percentile(times, 50)), float(np.percentile(times, 99))) if times else None
