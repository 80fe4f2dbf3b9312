"""vLLM in a process of its own, which `bench` starts: it answers one job of requests after another, over a pipe.

    PYTHON -P vllm_process.py about   prints what this Python has, as a JSON line, and imports no vLLM
    PYTHON -P vllm_process.py         reads settings, then jobs, and writes a line for each; what libraries print goes to stderr

It imports nothing of this project: vLLM may live in an environment of its own, of another Python. A line is a JSON object:

    settings   `llm`: arguments of vLLM's `LLM`; `stop_ids`: tokens that end an answer           -> `version`
    job        `requests`: [[token ids, most new tokens], ...]; `level`: how many in flight      -> see `answer_job`
    either, where it fails                                                                       -> `error`, and the process ends
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from importlib.metadata import entry_points
from typing import Any, TextIO

PLUGIN = "hydra_heads"


def about() -> dict[str, Any]:
    """`vllm`: whether it is here; `plugin`: whether vLLM would find this project's drafters; `prefix`: of the environment."""
    plugins = {point.name for point in entry_points(group="vllm.general_plugins")}
    return {"vllm": importlib.util.find_spec("vllm") is not None, "plugin": PLUGIN in plugins, "prefix": sys.prefix}


def answer_job(llm: Any, stop_ids: list[int], job: dict[str, Any]) -> dict[str, Any]:
    """Decode greedily, with `level` requests in flight, a new one sent when one ends.

    `tokens`: of each request; `sent`: when it was sent; `events`: [when, [[request, new tokens], ...]] of each step that gave
    tokens; `seconds`: of all; times in seconds since the first was sent. `drafted`: tokens; `accepted`: of them, by position.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    requests, engine, before = job["requests"], llm.llm_engine, counters(llm)
    params = [SamplingParams(temperature=0.0, max_tokens=most, stop_token_ids=stop_ids, ignore_eos=True, detokenize=False,
                             output_kind=RequestOutputKind.DELTA) for _, most in requests]
    tokens: list[list[int]] = [[] for _ in requests]
    sent: list[float] = []
    events: list[tuple[float, list[tuple[int, int]]]] = []
    running, began = 0, time.perf_counter()
    while True:
        while running < job["level"] and (number := len(sent)) < len(requests):
            sent.append(time.perf_counter() - began)
            engine.add_request(str(number), {"prompt_token_ids": requests[number][0]}, params[number])
            running += 1
        if not running:
            break
        outputs, now = engine.step(), time.perf_counter() - began
        new = []
        for output in outputs:
            number, found = int(output.request_id), list(output.outputs[0].token_ids)
            tokens[number] += found
            running -= bool(output.finished)
            new += [(number, len(found))] * bool(found)
        events += [(now, new)] * bool(new)
    seconds, after = time.perf_counter() - began, counters(llm)
    return {"tokens": tokens, "sent": sent, "events": events, "seconds": seconds, "drafted": after[0] - before[0],
            "accepted": [now - then for now, then in zip(after[1], before[1] or [0] * len(after[1]), strict=True)]}


def counters(llm: Any) -> tuple[int, list[int]]:
    """Drafted tokens, and of them the accepted ones by position, since the start; nothing where vLLM does not draft."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    if "vllm:spec_decode_num_draft_tokens" not in found:
        return 0, []
    by_position = found["vllm:spec_decode_num_accepted_tokens_per_pos"]
    return int(found["vllm:spec_decode_num_draft_tokens"].value), [int(count) for count in by_position.values]


def serve(answers: TextIO) -> None:
    """Load vLLM as the first line asks, then answer the others until there is none."""
    settings = json.loads(sys.stdin.readline())
    import vllm

    llm = vllm.LLM(**settings["llm"])
    say(answers, {"version": vllm.__version__})
    for line in sys.stdin:
        say(answers, answer_job(llm, settings["stop_ids"], json.loads(line)))


def say(answers: TextIO, value: dict[str, Any]) -> None:
    print(json.dumps(value), file=answers, flush=True)


def main() -> int:
    if sys.argv[1:] == ["about"]:
        say(sys.stdout, about())
        return 0
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        serve(answers)
        return 0
    except Exception as error:
        traceback.print_exc()
        say(answers, {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"})
        return 1


if __name__ == "__main__":  # vLLM's own processes import this file too
    sys.exit(main())
