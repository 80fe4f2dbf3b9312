"""What a quickstart shows first: the same questions answered plainly and with the bundled heads, with the speed of each."""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hydra_core.base import Base
from hydra_core.bundled import BUNDLED
from hydra_core.decoding import Engine, Result, load_heads
from hydra_core.sampling import Request
from pipelines.config import RunConfig
from pipelines.profiling.cost_cache import costs_of_one
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.console import say
from pipelines.runtime.tables import Table
from pipelines.tracking.lookup import bundled_heads

STAGE = "quickstart"
QUESTIONS = ("Explain in a few sentences how a bicycle stays upright.",
             "Write a short e-mail that moves a meeting from Monday to Thursday at ten.",
             "A shop sells pens at 3 for 2 euros. How much do 12 pens cost? Explain each step.")
NEW_TOKENS = 96
SHOWN = 300
"""Most characters of an answer on the terminal."""


@dataclass(frozen=True)
class Answers:
    """One question, answered twice."""

    question: str
    plain: Result
    drafted: Result


def show_first_answers(config: RunConfig) -> list[Answers]:
    """Answer `QUESTIONS` in this process and print the answers with their speed; nothing, if no heads are bundled for this base.

    The base is loaded for it and given back afterwards. Raises InputError for a base that cannot be loaded.
    """
    if bundled_heads(config) is None:
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(config.bench.threads)
    try:
        return _show_all(config, RunPaths.of(config).cache)
    finally:
        torch.set_num_threads(threads)
        gc.collect()  # what follows has the memory


def _show_all(config: RunConfig, cache: Path) -> list[Answers]:
    say(STAGE, f"{len(QUESTIONS)} questions first, with the heads that come with the package ...")
    base = config.base.load(cache)
    drafter, trees = load_heads(BUNDLED, base, partial(costs_of_one, base, cache))
    requests = [Request(question, tuple(base.encode_prompt(question)), NEW_TOKENS) for question in QUESTIONS]
    room = max(len(request.prompt_ids) for request in requests) + NEW_TOKENS
    answers = answer_twice(Engine(base, max_batch_size=1, context_limit=room),
                           Engine(base, drafter, trees, max_batch_size=1, context_limit=room), requests)
    for one in answers:
        _show(base, one)
    _table(answers, str(base.identity)).show()
    if any(one.plain.token_ids != one.drafted.token_ids for one in answers):
        say(STAGE, "answers differ where two tokens were all but equally likely: in fp32 they are the same")
    return answers


def answer_twice(plain: Engine, drafting: Engine, requests: Sequence[Request]) -> list[Answers]:
    """Each request by both engines, one after the other, so that what else the machine does meets both alike.

    A few tokens of the first one come before, which no figure counts: they meet cold caches.
    """
    for engine in (plain, drafting):
        engine.generate([Request("warm", requests[0].prompt_ids, 4)])
    return [Answers(request.id, plain.generate([request])[0], drafting.generate([request])[0]) for request in requests]


def _show(base: Base, one: Answers) -> None:
    """Question and answer, both answers where they differ."""
    say(STAGE, f'"{one.question}"')
    found = dict.fromkeys(base.decode(result.token_ids) for result in (one.plain, one.drafted))
    for text in found:
        say(STAGE, f"  {textwrap.shorten(text, SHOWN, placeholder=' ...')}")


def _table(answers: Sequence[Answers], base: str) -> Table:
    rows = []
    for one in answers:
        plain, drafted = one.plain.tokens_per_second, one.drafted.tokens_per_second
        rows.append((textwrap.shorten(one.question, 40, placeholder=" ..."), f"{plain:.1f}", f"{drafted:.1f}",
                     f"{drafted / plain:.2f}x" if plain else "-", f"{one.drafted.tokens_per_step:.2f}",
                     "yes" if one.plain.token_ids == one.drafted.token_ids else "no"))
    return Table(("question", "plain tokens/s", f"{BUNDLED} tokens/s", "faster", "tokens/step", "same tokens"), rows,
                 f"{base}: plain decoding beside the heads that come with the package")
