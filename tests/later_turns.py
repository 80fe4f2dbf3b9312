"""What kept prefixes gain: time to the first token of later turns of SmolLM2-135M-Instruct, kept and computed in turns.

    python -m tests.later_turns OUT.json --questions SPEC_BENCH.jsonl [--cache FOLDER] [--count 16] [--tokens 128]

Both contenders draft with the bundled heads; one keeps the keys and values of what it has answered (`Engine(prefix_cache=...)`).
`chat`: conversations of Spec-Bench with two turns; `agents`: three steps whose prompts hold all that came before; `instruction`:
single questions after the same page of instructions. Times are of the process, which other programs on the machine change least.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import Engine, Result
from hydra_core.sampling import Request
from tests.earlier_answers import contenders, conversations, mean_interval, prompts_of

PAGE = ("You answer for a library of a small town. " + " ".join(
    f"Rule {number}: books of shelf {number} may be borrowed for {7 + number % 5} days, and a day more costs {number % 9} cents."
    for number in range(1, 31)))


@dataclass(frozen=True)
class Turn:
    """One prompt of one contender. `first`: whether it opens a conversation; `seconds`: of the process, to the first token."""

    workload: str
    contender: str
    prompt: int
    first: bool
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    token_ids: tuple[int, ...]


def turns_of(workload: str, count: int, questions: Path) -> list[list[str]]:
    """The user's turns of `count` conversations."""
    if workload == "agents":
        return conversations("agents", 3 * count, questions)
    rows = [json.loads(line)["turns"] for line in questions.read_text(encoding="utf-8").splitlines()]
    if workload == "chat":
        several = [turns for turns in rows if len(turns) > 1]
        return random.Random(5).sample(several, min(count, len(several)))
    single = [turns for turns in rows if len(turns) == 1 and len(turns[0]) < 300]
    return [[f"{PAGE}\n{turns[0]}"] for turns in random.Random(5).sample(single, count)]


def ask(engine: Engine, ids: tuple[int, ...], tokens: int) -> tuple[float, Result]:
    """Seconds of the process to the first token, and the whole answer."""
    begun = time.process_time()
    engine.add(Request("one", ids, tokens))
    outputs = engine.step()
    while not any(output.token_ids for output in outputs):
        outputs = engine.step()
    seconds = time.process_time() - begun
    while not (ended := [output.result for output in outputs if output.result is not None]):
        outputs = engine.step()
    return seconds, ended[0]


def measure(base: Base, workload: str, engines: dict[str, Engine], turns: list[list[str]], tokens: int) -> list[Turn]:
    """Each contender answers each prompt before the next one comes; another begins each time."""
    taken: list[Turn] = []
    answers: dict[tuple[int, ...], tuple[int, ...]] = {}
    names, number = list(engines), 0
    room = engines[names[0]].context_limit - tokens
    for conversation in turns:
        for place, ids in enumerate(prompts_of(base, conversation, answers.__getitem__, room)):
            opened = place == 0 and (workload != "instruction" or number == 0)
            for name in names if number % 2 else names[::-1]:
                seconds, result = ask(engines[name], ids, tokens)
                taken.append(Turn(workload, name, number, opened, len(ids), result.cached_tokens, seconds, result.token_ids))
                if name == names[0]:
                    answers[ids] = result.token_ids
            number += 1
    return taken


def table(taken: list[Turn]) -> str:
    """Of later turns: medians, and the mean share of the time with its 95 % interval by bootstrap."""
    lines = ["workload turns prompt-tokens known first-token-ms computed -> kept, share (95 %), equal answers"]
    for workload in dict.fromkeys(one.workload for one in taken):
        mine = {name: {one.prompt: one for one in taken if (one.workload, one.contender, one.first) == (workload, name, False)}
                for name in ("computed", "kept")}
        shares = [mine["kept"][at].seconds / one.seconds for at, one in mine["computed"].items()]
        mean, low, high = mean_interval(shares)
        equal = sum(mine["kept"][at].token_ids == one.token_ids for at, one in mine["computed"].items())
        before, after = (1e3 * median(one.seconds for one in mine[name].values()) for name in ("computed", "kept"))
        prompt, known = (median(getattr(one, field) for one in mine["kept"].values())
                         for field in ("prompt_tokens", "cached_tokens"))
        lines.append(f"{workload} {len(shares)} {prompt:.0f} {known:.0f} {before:.0f} -> {after:.0f}, "
                     f"{mean:.3f} ({low:.3f}-{high:.3f}), {equal} of {len(shares)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".hydra-heads" / "cache")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", default=["chat", "agents", "instruction"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    base = load_base("embedded:smollm2-135m", dtype="bf16", cache=given.cache)
    drafter = contenders(base, given.cache, ["bundled"], 0)["bundled"]
    taken: list[Turn] = []
    for workload in given.workloads:
        engines = {name: Engine(base, drafter, max_batch_size=1, context_limit=3072, prefix_cache=kept)
                   for name, kept in (("computed", 0), ("kept", 8192))}
        for engine in engines.values():
            ask(engine, (5, 6, 7, 8), 24)
        taken += measure(base, workload, engines, turns_of(workload, given.count, given.questions), given.tokens)
        print(table(taken), flush=True)
        given.out.write_text(json.dumps([asdict(one) for one in taken]), encoding="utf-8")


if __name__ == "__main__":
    main()
