"""What drafts from earlier answers gain: three workloads of SmolLM2-135M-Instruct, with and without them, in alternating order.

    python -m tests.earlier_answers OUT.json --questions SPEC_BENCH.jsonl [--cache FOLDER] [--count 32] [--tokens 128] [--batch 1]

Each contender keeps its engine, and so the finished answers, throughout a workload, and sees each prompt once. `like`: prompts
of a batch job that differ by a few words; `agents`: tasks of an agent, each of three steps whose prompts hold all that came
before; `unrelated`: questions of many kinds, each of another subject.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import Engine, load_heads
from hydra_core.proposers import AdaptiveDrafter, SuffixDrafter
from hydra_core.sampling import Request
from pipelines.profiling.cost_cache import machine_costs

SHOPS = ("Nordlicht", "Blue Harbor", "Casa Verde", "Hilltop Tools")
ITEMS = ("a desk lamp", "hiking boots", "a coffee grinder", "two pillows", "a bicycle pump", "a tea kettle", "a raincoat",
         "a set of knives")
PROBLEMS = ("arrived broken", "has not arrived after two weeks", "came in the wrong colour", "was charged twice")
LIKE = ("You answer letters to the shop {shop}. A customer writes that an order of {item} {problem}. Write a polite reply of one "
        "paragraph, offer a refund or a replacement, and end with the name of the shop.")
AGENT = ("You are an agent that keeps a list of tasks. In each step write the action as one line of JSON with the keys \"tool\", "
         "\"path\" and \"reason\", and then one sentence that says what you expect.")
TASKS = ("rename the report {n} to final", "delete the old copies of report {n}", "send report {n} to the accountant",
         "count the pages of report {n}")
STEPS = ("Write the first action for this task: {task}.", "The tool answered: done. Write the second action.",
         "The tool answered: permission denied. Write the third action and repeat all three in a list.")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Taken:
    """One answer of one contender. `seconds`: of processor time, prompt included, which other programs on the machine change
    least; in a running batch the answer's share of it by tokens."""

    workload: str
    contender: str
    prompt: int
    tokens: int
    steps: int
    seconds: float
    draft_seconds: float
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


def conversations(workload: str, count: int, questions: Path) -> list[list[str]]:
    """The user's turns of `count` conversations."""
    dice = random.Random(5)
    if workload == "like":
        every = [LIKE.format(shop=shop, item=item, problem=problem) for shop in SHOPS for item in ITEMS for problem in PROBLEMS]
        return [[text] for text in dice.sample(every, count)]
    if workload == "agents":
        tasks = [task.format(n=n) for n in range(10, 40) for task in TASKS]
        return [[f"{AGENT}\n{STEPS[0].format(task=task)}", *STEPS[1:]] for task in dice.sample(tasks, count // len(STEPS))]
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kinds.setdefault(row["category"], []).append(row["turns"][0])
    dealt = [texts[place] for place in range(max(map(len, kinds.values()))) for texts in kinds.values() if place < len(texts)]
    return [[text] for text in dealt[:count]]


def contenders(base: Base, cache: Path, wanted: list[str], max_tokens: int) -> dict[str, AdaptiveDrafter | None]:
    drafter, _ = load_heads("bundled", base, lambda heads: machine_costs(base, cache, heads))
    assert isinstance(drafter, AdaptiveDrafter)
    text, suffix = replace(drafter, heads=None, costs=machine_costs(base, cache)), SuffixDrafter(max_tokens=max_tokens)
    every = {"plain": None, "ngram": text, "ngram+answers": replace(text, suffix=suffix),
             "answers": replace(text, suffix=suffix, ngram=None),
             "own": replace(text, suffix=replace(suffix, max_tokens=0), ngram=None), "bundled": drafter,
             "bundled+answers": replace(drafter, suffix=suffix)}
    return {name: every[name] for name in wanted}


def prompts_of(base: Base, turns: list[str], answer: Callable[[tuple[int, ...]], tuple[int, ...]],
               room: int) -> Iterator[tuple[int, ...]]:
    """The prompt of each turn; `answer`: what the first contender answers to one."""
    messages: Messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = tuple(base.encode_prompt(None, messages))
        if len(ids) > room:
            return
        yield ids
        messages.append({"role": "assistant", "content": base.decode(answer(ids)).strip()})


def one_by_one(base: Base, workload: str, engines: dict[str, Engine], turns: list[list[str]], tokens: int) -> list[Taken]:
    """Each contender answers each prompt before the next prompt comes; another one begins each time."""
    taken: list[Taken] = []
    answers: dict[tuple[int, ...], tuple[int, ...]] = {}
    names, number = list(engines), 0
    for conversation in turns:
        for ids in prompts_of(base, conversation, lambda ids: answers[ids], engines[names[0]].context_limit - tokens):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                engine = engines[name]
                before, begun = engine.times, time.process_time()
                result = engine.generate([Request("one", ids, tokens)])[0]
                seconds, spent = time.process_time() - begun, engine.times - before
                taken.append(Taken(workload, name, number, len(result.token_ids), result.steps, seconds, spent.draft, ids,
                                   result.token_ids))
                if name == names[0]:
                    answers[ids] = result.token_ids
            number += 1
    return taken


def in_batches(base: Base, workload: str, engines: dict[str, Engine], turns: list[list[str]], tokens: int) -> list[Taken]:
    """All prompts (the first turns) in a running batch, contender after contender."""
    taken = []
    for name, engine in engines.items():
        requests = [Request(str(number), tuple(base.encode_prompt(conversation[0])), tokens)
                    for number, conversation in enumerate(turns)]
        before, begun = engine.times, time.process_time()
        results = engine.generate(requests)
        seconds, spent = time.process_time() - begun, engine.times - before
        taken += [Taken(workload, name, number, len(result.token_ids), result.steps, seconds * len(result.token_ids)
                        / sum(len(one.token_ids) for one in results), spent.draft / len(results), result.prompt_ids,
                        result.token_ids) for number, result in enumerate(results)]
    return taken


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval by bootstrap."""
    dice = random.Random(0)
    means = sorted(sum(dice.choices(values, k=len(values))) / len(values) for _ in range(1000))
    return sum(values) / len(values), means[25], means[975]


def table(taken: list[Taken], names: list[str]) -> str:
    """Tokens per step, tokens per second, and the speed against the first contender: the mean over prompts and its 95 %
    interval by bootstrap."""
    lines = ["workload contender tokens/step tokens/s ratio (95 %) draft-ms/step"]
    for workload in dict.fromkeys(one.workload for one in taken):
        for name in names:
            mine = {one.prompt: one for one in taken if (one.workload, one.contender) == (workload, name)}
            first = {one.prompt: one for one in taken if (one.workload, one.contender) == (workload, names[0])}
            ratios = [mine[p].tokens / mine[p].seconds / (first[p].tokens / first[p].seconds) for p in mine if mine[p].steps]
            mean, low, high = mean_interval(ratios)
            steps = sum(one.steps for one in mine.values())
            lines.append(f"{workload} {name} {sum(one.tokens - 1 for one in mine.values()) / steps:.2f} "
                         f"{sum(one.tokens for one in mine.values()) / sum(one.seconds for one in mine.values()):.1f} "
                         f"{mean:.3f} ({low:.3f}-{high:.3f}) "
                         f"{1e3 * sum(one.draft_seconds for one in mine.values()) / steps:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".hydra-heads" / "cache")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=2**18)
    parser.add_argument("--workloads", nargs="+", default=["like", "agents", "unrelated"])
    parser.add_argument("--contenders", nargs="+", default=["bundled", "bundled+answers"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base = load_base("embedded:smollm2-135m", dtype="bf16", cache=given.cache)
    drafters = contenders(base, given.cache, given.contenders, given.max_tokens)
    taken: list[Taken] = []
    for workload in given.workloads:
        engines = {name: Engine(base, drafter, max_batch_size=given.batch, context_limit=2048)
                   for name, drafter in drafters.items()}
        for engine in engines.values():
            engine.generate([Request("warm", (5, 6, 7, 8), 24, stop_ids=())])
            engine.forget_answers()
        measure = one_by_one if given.batch == 1 else in_batches
        taken += measure(base, workload, engines, conversations(workload, given.count, given.questions), given.tokens)
        print(table(taken, given.contenders), flush=True)
        found: list[dict[str, Any]] = [asdict(one) for one in taken]
        given.out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
