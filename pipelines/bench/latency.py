"""The measurement of `bench`: every contender decodes the same prompts in one process, in turn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hydra_core.base import Base, pick_device
from hydra_core.decoding import Engine
from hydra_core.errors import InputError
from hydra_core.proposers import Drafter, kind_of
from hydra_core.sampling import Request
from hydra_core.storage import as_path
from hydra_core.tree import PLAIN as PLAIN_TREE
from hydra_core.tree import TreeSet
from pipelines.bench.concurrency import check_concurrency, measure_concurrency
from pipelines.bench.hf_transformers import single_contender, synchronize
from pipelines.bench.llama_cpp import llama_contender
from pipelines.bench.losslessness import check_differences, check_losslessness, check_vllm_losslessness
from pipelines.bench.memory import PeakMemory
from pipelines.bench.plan import (
    LLAMA,
    LOOKUP,
    PLAIN,
    BenchPlan,
    Outcome,
    Question,
    Row,
    append_row,
    is_foreign,
    make_drafter,
    read_rows,
)
from pipelines.bench.questions import prompt_of, room_for_turns, turns_of
from pipelines.bench.throughput import measure_batches
from pipelines.bench.vllm_contender import VllmPool
from pipelines.config.bench import is_vllm
from pipelines.profiling.cost_cache import fingerprint_of_machine, machine_costs
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import write_text
from pipelines.runtime.logs import speak

WARM_UP_TOKENS = 8
MACHINE = "machine.json"
"""Beside the rows: the machine that they were timed on."""

Contender = Callable[[tuple[int, ...], int], Outcome]
"""From a prompt's token ids and the maximum of new tokens to the outcome."""


def measure(plan: BenchPlan, questions: list[Question]) -> None:
    """Measure what the output files still lack: single requests, losslessness, throughput, concurrency."""
    speak()
    torch.set_num_threads(plan.threads)
    check_concurrency(plan, questions)
    with VllmPool(plan, questions) as vllm:
        if plan.single:
            measure_single(plan, questions, vllm)
        check_differences(plan, questions, read_rows(as_path(plan.rows_file)))
        check_losslessness(plan, questions)
        check_vllm_losslessness(plan, questions)
        measure_batches(plan, questions, vllm)
        measure_concurrency(plan, questions, vllm)


def measure_single(plan: BenchPlan, questions: list[Question], vllm: VllmPool | None = None) -> None:
    """One request at a time: question by question, turn by turn, every contender on the same context.

    Rows that the file already holds are not measured again; the context of a later turn is built from plain's answers there.
    Rows of another machine are measured again. `vllm`: where the plan has contenders of vLLM.
    """
    path = as_path(plan.rows_file)
    done = _measured(path)
    todo = _missing(plan, questions, done)
    if not todo:
        return
    if _drop_rows_of_another_machine(path, fingerprint_of_machine(pick_device(plan.base.device))):
        done = {}
        todo = _missing(plan, questions, done)
    base = plan.base.load(plan.cache)
    room = room_for_turns(base, plan.max_new_tokens, questions)
    contenders = make_contenders(plan, base, room, vllm)
    for run in contenders.values():
        run(questions[0].prompt_ids, min(WARM_UP_TOKENS, plan.max_new_tokens))
    measured_round: int | None = None
    memory = PeakMemory(as_path(plan.memory_file), base.device)
    with Progress("bench", "questions", total=plan.rounds * len(questions),
                  done=plan.rounds * len(questions) - len(todo)) as progress:
        for number, place, question in todo:
            if number != measured_round:  # else answers of one round would be drafts of the next
                measured_round = number
                for run in contenders.values():
                    if isinstance(run, EngineContender):
                        run.engine.forget_answers()
                        run.engine.forget_prefixes()
            shift = (place + number) % len(plan.methods)
            answers: list[tuple[int, ...]] = []
            for turn in turns_of(question):
                try:
                    prompt_ids = prompt_of(question, answers, base, room)
                except InputError as error:
                    say("bench", f"question {question.id}: turn {turn + 1}: {error}: left out")
                    break
                for method in plan.methods[shift:] + plan.methods[:shift]:  # no contender is always the first
                    if (key := (number, question.id, turn, method)) in done:
                        continue
                    with memory.of(method):
                        outcome = contenders[method](prompt_ids, min(plan.max_new_tokens, room - len(prompt_ids)))
                    append_row(path, Row(round=number, question=question.id, category=question.category, method=method,
                                         turn=turn, **vars(outcome)))
                    done[key] = outcome.token_ids
                answers.append(done[number, question.id, turn, PLAIN])
            progress.advance()
    memory.write()


Key = tuple[int, str, int, str]
"""Round, question, turn and contender of a row."""


def _measured(path: Path) -> dict[Key, tuple[int, ...]]:
    return {(row.round, row.question, row.turn, row.method): row.token_ids for row in read_rows(path)}


def _missing(plan: BenchPlan, questions: list[Question], done: Mapping[Key, object]) -> list[tuple[int, int, Question]]:
    """Round, place and question of those that lack a row."""
    return [(number, place, question) for number in range(plan.rounds) for place, question in enumerate(questions)
            if any((number, question.id, turn, method) not in done for turn in turns_of(question) for method in plan.methods)]


def _drop_rows_of_another_machine(path: Path, machine: dict[str, Any]) -> bool:
    """Whether the rows in `path` were timed on another machine than `machine`. They are deleted then, as contenders are compared
    on each question. The machine is recorded beside them; rows of an earlier version, without a record, count as this one's."""
    beside = path.with_name(MACHINE)
    try:
        then = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        then = machine
    other = bool(then != machine and path.exists())
    if other:
        say("bench", f"earlier rows were timed on another machine ({then}), not on this one ({machine}): they are timed again")
        write_text(path, "")
    write_text(beside, json.dumps(machine))
    return other


# -- contenders --------------------------------------------------------------------------------------------------------

def make_contenders(plan: BenchPlan, base: Base, room: int, vllm: VllmPool | None = None) -> dict[str, Contender]:
    """Every contender of the plan, with caches for `room` tokens of prompt and answer. `vllm`: where the plan has vLLM's."""
    made: dict[str, Contender] = {}
    for method in plan.methods:
        if method == LLAMA:
            made[method] = llama_contender(plan, base, room)
        elif is_vllm(method):
            assert vllm is not None
            made[method] = partial(vllm.alone, method, base)
        elif is_foreign(method):
            made[method] = single_contender(plan, base, plan.ngram[2] if method == LOOKUP else None)
        else:
            drafter, trees = make_drafter(method, plan, base)
            engine = Engine(base, drafter, trees, max_batch_size=1, context_limit=room, shared_noise=plan.shared_noise,
                            prefix_cache=plan.prefix_cache_tokens)
            made[method] = EngineContender(engine, plan.temperature, _fixed_step(plan, base, drafter, trees))
    return made


def _fixed_step(plan: BenchPlan, base: Base, drafter: Drafter | None, trees: TreeSet | None) -> Callable[[int], float] | None:
    """Context length in tokens -> seconds that this machine's step costs predict for a step, where every step has the same
    tree; None for dynamic trees, whose predictions the engine itself adds up."""
    kind = kind_of(drafter)
    if not base.supports_tree or not kind.fixed_trees:
        return None
    tree = trees.for_batch(1) if trees else PLAIN_TREE
    heads = kind.heads if tree.depth else None
    costs = machine_costs(base, Path(plan.cache), heads, trees=None if heads is None else {tree.depth: tree})
    return lambda context: costs.seconds(1, tree.size, tree.depth, context)


@dataclass(frozen=True)
class EngineContender:
    """Decodes with this project's engine. `fixed_step`: see `_fixed_step`."""

    engine: Engine
    temperature: float
    fixed_step: Callable[[int], float] | None

    def __call__(self, prompt_ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
        engine = self.engine
        synchronize(engine.base)
        before = engine.times
        result = engine.generate([Request("bench", prompt_ids, max_new_tokens, self.temperature)])[0]
        spent = engine.times - before
        middle = len(prompt_ids) + len(result.token_ids) // 2
        return Outcome(token_ids=result.token_ids, steps=result.steps, drafted=result.drafted, accepted=result.accepted,
                       prefill_seconds=result.prefill_seconds, decode_seconds=result.decode_seconds,
                       accepted_lengths=result.accepted_lengths, draft_seconds=spent.draft, verify_seconds=spent.verify,
                       accept_seconds=spent.accept, commit_seconds=spent.commit,
                       predicted_seconds=result.steps * self.fixed_step(middle) if self.fixed_step else spent.predicted)
