"""vLLM with exported heads against vLLM without, alternately, one request at a time.

    python -m tests.hydra_core.interop.vllm_speed BASE EXPORT QUESTIONS.jsonl [questions=24] [tokens=128] [count=4] [dtype=...]

BASE: a folder; EXPORT: what `hydra-heads export` wrote; QUESTIONS: lines with `turns` or `prompt`. Both stay loaded; every
question is asked of one, then of the other, in turns of who is first. Prints the ratio of tokens a second with a bootstrap
interval over questions, tokens a step, acceptance by position and how many answers differ.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.hydra_core.interop.vllm_answers import MARK, ROOT, SETTINGS


class Contender:
    """A vLLM that stays."""

    def __init__(self, name: str, job: dict[str, Any], folder: Path) -> None:
        self.name, path = name, folder / f"{name}.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        words = [sys.executable, "-m", "tests.hydra_core.interop.vllm_answers", str(path)]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, **SETTINGS})

    def ask(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompts": [prompt], "max_tokens": tokens}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return found
        raise RuntimeError(f"{self.name} ended")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def prompts_of(path: Path, base: str, count: int) -> list[list[int]]:
    """Token ids of `count` questions, evenly spread over the file."""
    from hydra_core.base import encode_prompt, load_tokenizer

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = load_tokenizer(Path(base))
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    return [encode_prompt(tokenizer, row["turns"][0] if "turns" in row else row["prompt"]) for row in chosen]


def report(pairs: list[dict[str, dict[str, Any]]], count: int) -> str:
    def speed(name: str, of: list[dict[str, dict[str, Any]]]) -> float:
        return sum(len(pair[name]["tokens"][0]) for pair in of) / sum(pair[name]["seconds"][0] for pair in of)

    ratio = speed("heads", pairs) / speed("plain", pairs)
    draw = random.Random(0)
    resampled = (draw.choices(pairs, k=len(pairs)) for _ in range(1000))
    drawn = sorted(speed("heads", some) / speed("plain", some) for some in resampled)
    drafts = sum(pair["heads"]["drafts"] for pair in pairs)
    accepted = [sum(pair["heads"]["accepted"][place] for pair in pairs) for place in range(count)]
    same = sum(pair["heads"]["tokens"] == pair["plain"]["tokens"] for pair in pairs)
    return (f"vLLM {speed('plain', pairs):.1f} tokens/s, with heads {speed('heads', pairs):.1f}: {ratio:.2f}x "
            f"({drawn[25]:.2f} - {drawn[974]:.2f}); {1 + sum(accepted) / drafts:.2f} tokens a step, accepted by position "
            f"{', '.join(f'{one / drafts:.3f}' for one in accepted)} of {drafts} drafts; "
            f"{same} of {len(pairs)} answers identical")


def main(words: list[str]) -> None:
    base, export, questions = words[:3]
    more = {"questions": "24", "tokens": "128", "count": "4", "dtype": "bfloat16"} | dict(word.split("=") for word in words[3:])
    prompts, count = prompts_of(Path(questions), base, int(more["questions"])), int(more["count"])
    job = {"model": base, "dtype": more["dtype"], "limit": 2048, "prompts": []}
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        both = [Contender("plain", job, Path(folder)), Contender("heads", job | {"heads": export, "count": count}, Path(folder))]
        for one in both:
            one.ask(prompts[0], 16)  # what is compiled or packed once
        for prompt in prompts:
            pairs.append({one.name: one.ask(prompt, int(more["tokens"])) for one in both})
            both.reverse()
        for one in both:
            one.end()
    print(report(pairs, count))


if __name__ == "__main__":
    main(sys.argv[1:])
