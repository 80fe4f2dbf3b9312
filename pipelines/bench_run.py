"""The measuring of `bench`: every contender on the same prompts in one process, taking turns."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hydra_core.base import Base, load_base
from hydra_core.checkpoint import load_checkpoint
from hydra_core.decoding import Engine, Request, compare, naive_generate
from hydra_core.drafters import HeadDrafter, NgramDrafter
from hydra_core.tree import TreeSet
from pipelines.config import BaseSection

PLAIN, TRANSFORMERS, NGRAM = "plain", "transformers", "ngram"
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """One prompt to decode, already as token ids."""

    id: str
    category: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class BenchPlan:
    """Everything the measuring task needs; plain values, so that Ray can ship it. `heads`: name -> checkpoint folder."""

    base: BaseSection
    cache: str
    rows_file: str
    identity_file: str
    methods: tuple[str, ...]
    heads: dict[str, str]
    ngram: tuple[int, int, int]
    max_new_tokens: int
    rounds: int
    identity_prompts: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return asdict(self) | {"base": self.base.model_dump(mode="json")}


@dataclass(frozen=True)
class Row:
    """One contender on one question in one round. Seconds are wall time; `steps` are base forwards after prefill."""

    round: int
    question: str
    category: str
    method: str
    token_ids: tuple[int, ...]
    steps: int
    drafted: int
    accepted: int
    prefill_seconds: float
    decode_seconds: float


Contender = Callable[[Question, int], tuple[tuple[int, ...], int, int, int, float, float]]


def measure(plan: BenchPlan, questions: list[Question]) -> None:
    """Run what is still missing from the rows file, each row written at once, then the fp32 identity check."""
    torch.set_num_threads(plan.threads)
    done = {(row.round, row.question, row.method) for row in read_rows(Path(plan.rows_file))}
    todo = [(number, turn, question) for number in range(plan.rounds) for turn, question in enumerate(questions)
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
                    _append(Path(plan.rows_file), Row(number, question.id, question.category, method, *outcome))
            print(f"bench: question {count}/{len(todo)}", file=sys.stderr, flush=True)
    _check_identity(plan, questions)


def read_rows(path: Path) -> list[Row]:
    """Rows written so far; a line cut short by a kill is left out."""
    return [Row(**{**values, "token_ids": tuple(values["token_ids"])}) for values in _read_lines(path)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    values = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return values


def _append(path: Path, row: Row | IdentityRow) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as handle:
        if handle.tell() and not _ends_with_newline(handle):
            handle.write(b"\n")  # a killed run left half a line: keep it apart
        handle.write(json.dumps(asdict(row)).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


def _ends_with_newline(handle: Any) -> bool:
    handle.seek(-1, os.SEEK_END)
    return handle.read(1) == b"\n"


# -- contenders --------------------------------------------------------------------------------------------------------

def _contenders(plan: BenchPlan, questions: list[Question]) -> dict[str, Contender]:
    base = load_base(plan.base.model, dtype=plan.base.dtype, device=plan.base.device, cache=Path(plan.cache),
                     context_limit=plan.base.context_limit)
    limit = _context(base, plan, questions)
    made: dict[str, Contender] = {}
    for method in plan.methods:
        if method == TRANSFORMERS:
            made[method] = _transformers(plan, base)
        else:
            drafter, trees = _drafter(method, plan, base)
            made[method] = _engine(Engine(base, drafter, trees, max_batch=1, context_limit=limit), base)
    return made


def _context(base: Base, plan: BenchPlan, questions: list[Question]) -> int:
    longest = max(len(question.prompt_ids) for question in questions) + plan.max_new_tokens
    return min(base.context_limit, longest)


def _drafter(method: str, plan: BenchPlan, base: Base) -> tuple[HeadDrafter | NgramDrafter | None, TreeSet | None]:
    if method == PLAIN:
        return None, None
    if method == NGRAM:
        return NgramDrafter(*plan.ngram), None
    loaded = load_checkpoint(Path(plan.heads[method]), base.vocabulary, base.dtype)
    return loaded.drafter, loaded.trees


def _engine(engine: Engine, base: Base) -> Contender:
    def run(question: Question, max_new_tokens: int) -> tuple[tuple[int, ...], int, int, int, float, float]:
        _settle(base)
        result = engine.generate([Request(question.id, question.prompt_ids, max_new_tokens)])[0]
        return (result.token_ids, result.steps, result.drafted, result.accepted, result.prefill_seconds,
                result.decode_seconds)

    return run


def _transformers(plan: BenchPlan, base: Base) -> Contender:
    """transformers' own `generate`, greedy, on the same folder and weight format."""
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    from hydra_core.base import resolve_base
    from hydra_core.base.load import DTYPES

    folder = resolve_base(plan.base.model, Path(plan.cache)).folder
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[plan.base.dtype], use_safetensors=True)
    model = model.to(base.device).eval()

    class FirstToken(StoppingCriteria):
        """Never stops; notes when the first token stood."""

        at = 0.0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            self.at = self.at or time.perf_counter()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run(question: Question, max_new_tokens: int) -> tuple[tuple[int, ...], int, int, int, float, float]:
        ids = torch.tensor([question.prompt_ids], device=base.device)
        clock = FirstToken()
        _settle(base)
        started = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
                                    max_new_tokens=max_new_tokens, stopping_criteria=StoppingCriteriaList([clock]),
                                    eos_token_id=list(base.stop_ids) or None, temperature=None, top_p=None, top_k=None)
        tokens = tuple(output[0, ids.shape[1]:].tolist())
        ended = time.perf_counter()
        return tokens, len(tokens) - 1, 0, 0, clock.at - started, ended - clock.at

    return run


def _settle(base: Base) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize()


# -- identity ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class IdentityRow:
    """One drafter against the naive loop on one prompt in fp32."""

    question: str
    method: str
    verdict: str
    index: int | None
    gap: float | None


def read_identity(path: Path) -> list[IdentityRow]:
    return [IdentityRow(**values) for values in _read_lines(path)]


def _check_identity(plan: BenchPlan, questions: list[Question]) -> None:
    """fp32: every engine contender against the naive loop, token for token."""
    path = Path(plan.identity_file)
    done = {(row.question, row.method) for row in read_identity(path)}
    methods = [method for method in plan.methods if method != TRANSFORMERS]
    todo = [question for question in questions[:plan.identity_prompts]
            if any((question.id, method) not in done for method in methods)]
    if not todo:
        return
    section = plan.base
    base = load_base(section.model, dtype="fp32", device=section.device, cache=Path(plan.cache),
                     context_limit=section.context_limit)
    limit = _context(base, plan, questions)
    engines = {method: Engine(base, *_drafter(method, plan, base), max_batch=1, context_limit=limit) for method in methods}
    exact: Base | None = None
    for count, question in enumerate(todo, start=1):
        request = Request(question.id, question.prompt_ids, plan.max_new_tokens)
        reference = naive_generate(base, request, limit)
        for method, engine in engines.items():
            if (question.id, method) in done:
                continue
            answer = engine.generate([request])[0].token_ids
            if answer != reference.token_ids and exact is None:
                exact = load_base(section.model, dtype="fp32", device=section.device, cache=Path(plan.cache), widen=True)
            found = compare(exact or base, question.prompt_ids, reference.token_ids, answer)
            _append(path, IdentityRow(question.id, method, found.verdict, found.index, found.gap))
        print(f"bench: fp32 identity, prompt {count}/{len(todo)}", file=sys.stderr, flush=True)
