"""The measuring of `bench`: every contender on the same prompts in one process, taking turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import Engine
from hydra_core.errors import InputError
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, Drafter
from hydra_core.sampling import Request
from hydra_core.tree import PLAIN as PLAIN_TREE
from hydra_core.tree import TreeSet
from pipelines.bench.concurrency import check_load, measure_load
from pipelines.bench.llama_cpp import llama_contender
from pipelines.bench.losslessness import check_differences, check_identity
from pipelines.bench.memory import PeakMemory
from pipelines.bench.plan import (
    FOREIGN,
    LLAMA,
    LOOKUP,
    PLAIN,
    BenchPlan,
    Outcome,
    Question,
    Row,
    append_row,
    make_drafter,
    read_rows,
    transformers_model,
)
from pipelines.bench.questions import prompt_of, room_for_turns, turns_of
from pipelines.bench.throughput import measure_batches
from pipelines.profiling.cost_cache import machine_costs
from pipelines.runtime.logs import speak

WARM_UP_TOKENS = 8

Contender = Callable[[tuple[int, ...], int], Outcome]
"""From a prompt's token ids and the most new tokens to what was made of it."""


def measure(plan: BenchPlan, questions: list[Question]) -> None:
    """Run what is still missing from the rows file, each row written at once, then identity, throughput and load."""
    speak()
    torch.set_num_threads(plan.threads)
    check_load(plan, questions)
    if plan.single:
        measure_single(plan, questions)
    check_differences(plan, questions, read_rows(Path(plan.rows_file)))
    check_identity(plan, questions)
    measure_batches(plan, questions)
    measure_load(plan, questions)


def measure_single(plan: BenchPlan, questions: list[Question]) -> None:
    """One request at a time: question by question, turn by turn, every contender on the same context.

    What stands in the rows file is not run again; a turn that follows others is put together from plain's answers there.
    """
    path = Path(plan.rows_file)
    done = {(row.round, row.question, row.turn, row.method): row.token_ids for row in read_rows(path)}
    todo = [(number, place, question) for number in range(plan.rounds) for place, question in enumerate(questions)
            if any((number, question.id, turn, method) not in done for turn in turns_of(question) for method in plan.methods)]
    if not todo:
        return
    base = load_base(plan.base.model, dtype=plan.base.dtype, device=plan.base.device, cache=Path(plan.cache),
                     context_limit=plan.base.context_limit)
    room = room_for_turns(base, plan.max_new_tokens, questions)
    contenders = make_contenders(plan, base, room)
    for run in contenders.values():
        run(questions[0].prompt_ids, min(WARM_UP_TOKENS, plan.max_new_tokens))
    memory = PeakMemory(Path(plan.memory_file), base.device)
    for count, (number, place, question) in enumerate(todo, start=1):
        shift = (place + number) % len(plan.methods)
        answers: list[tuple[int, ...]] = []
        for turn in turns_of(question):
            try:
                prompt_ids = prompt_of(question, answers, base, room)
            except InputError as error:
                _say(f"question {question.id}: turn {turn + 1}: {error}: left out")
                break
            for method in plan.methods[shift:] + plan.methods[:shift]:  # nobody is always first
                if (key := (number, question.id, turn, method)) in done:
                    continue
                with memory.of(method):
                    outcome = contenders[method](prompt_ids, min(plan.max_new_tokens, room - len(prompt_ids)))
                append_row(path, Row(round=number, question=question.id, category=question.category, method=method, turn=turn,
                                     **vars(outcome)))
                done[key] = outcome.token_ids
            answers.append(done[number, question.id, turn, PLAIN])
        _say(f"question {count}/{len(todo)}")
    memory.write()


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


# -- contenders --------------------------------------------------------------------------------------------------------

def make_contenders(plan: BenchPlan, base: Base, room: int) -> dict[str, Contender]:
    """Every contender of the plan, with caches for `room` tokens of prompt and answer."""
    made: dict[str, Contender] = {}
    for method in plan.methods:
        if method == LLAMA:
            made[method] = llama_contender(plan, base, room)
        elif method in FOREIGN:
            made[method] = _transformers(plan, base, plan.ngram[2] if method == LOOKUP else None)
        else:
            drafter, trees = make_drafter(method, plan, base)
            engine = Engine(base, drafter, trees, max_batch_size=1, context_limit=room, shared_noise=plan.shared_noise)
            made[method] = _engine(engine, plan.temperature, _fixed_step(plan, base, drafter, trees))
    return made


def _fixed_step(plan: BenchPlan, base: Base, drafter: Drafter | None, trees: TreeSet | None) -> Callable[[int], float] | None:
    """Seconds that this machine's costs foretell for a step over so many tokens of context, where every step has the same
    tree; None where trees are grown, for which the engine itself keeps what was foretold."""
    if not base.supports_tree or isinstance(drafter, AdaptiveDrafter):
        return None
    tree = trees.for_batch(1) if trees else PLAIN_TREE
    heads = drafter if isinstance(drafter, HeadDrafter) and tree.depth else None
    costs = machine_costs(base, Path(plan.cache), heads, trees=None if heads is None else {tree.depth: tree})
    return lambda context: costs.seconds(1, tree.size, tree.depth, context)


def _engine(engine: Engine, temperature: float, fixed_step: Callable[[int], float] | None) -> Contender:
    def run(prompt_ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
        _settle(engine.base)
        before = engine.times
        result = engine.generate([Request("bench", prompt_ids, max_new_tokens, temperature)])[0]
        spent = engine.times - before
        middle = len(prompt_ids) + len(result.token_ids) // 2
        return Outcome(token_ids=result.token_ids, steps=result.steps, drafted=result.drafted, accepted=result.accepted,
                       prefill_seconds=result.prefill_seconds, decode_seconds=result.decode_seconds,
                       accepted_lengths=result.accepted_lengths, draft_seconds=spent.draft, verify_seconds=spent.verify,
                       accept_seconds=spent.accept, commit_seconds=spent.commit,
                       predicted_seconds=result.steps * fixed_step(middle) if fixed_step else spent.predicted)

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

    def run(prompt_ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
        nonlocal steps
        steps = 0
        ids = torch.tensor([prompt_ids], device=base.device)
        clock = FirstToken()
        _settle(base)
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([clock]),
                                    max_new_tokens=min(max_new_tokens, base.context_limit - ids.shape[1]), **drafting)
        tokens = tuple(output[0, ids.shape[1]:].tolist())
        ended = time.perf_counter()
        return Outcome(token_ids=tokens, steps=steps - 1, prefill_seconds=clock.at - started, decode_seconds=ended - clock.at)

    return run


def _settle(base: Base) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize()
