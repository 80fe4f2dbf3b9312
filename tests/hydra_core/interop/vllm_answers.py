"""One vLLM in a process of its own: answers a job's prompts and tells what was drafted and accepted.

    python -m tests.hydra_core.interop.vllm_answers JOB.json ANSWERS.json

A job: `model`, `dtype`, `prompts` (lists of token ids), `heads` (an exported folder, or null), `count` (drafted tokens), `more`
and `speculative` (settings of vLLM) and `runs`, each with `max_tokens`, `temperature`, `together` (how many requests at once;
without it all) and `prompts` of its own where it has some. Each run becomes
`{"tokens": [...], "drafts": n, "accepted": [by position], "seconds": [of each batch]}`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
            "TOKENIZERS_PARALLELISM": "false"}
SECONDS = 400


def answer(job: dict[str, Any], folder: Path, python: str = sys.executable,
           module: str = "tests.hydra_core.interop.vllm_answers") -> list[dict[str, Any]]:
    """What the job's runs gave in `python`, and in `log` of the first what vLLM wrote; raises AssertionError with its last
    lines. `module`: the program, this one or another one that takes the same two files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    words = [python, "-m", module, str(folder / "job.json"), str(folder / "out.json")]
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"  # without it vLLM's drafting is slow on a CPU
    preload = {"LD_PRELOAD": str(openmp)} if openmp.exists() else {}
    with open(folder / "log.txt", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                                   env={**os.environ, **SETTINGS, **preload})
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            with suppress(ProcessLookupError):  # vLLM's engine is a process of this session too, and may outlive the first one
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        text = log.read()
    assert code == 0, f"vLLM ended with {code} ({SECONDS} s at most)\n" + "\n".join(text.splitlines()[-40:])
    runs: list[dict[str, Any]] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    runs[0]["log"] = text
    return runs


def main(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Start vLLM, then answer the job's runs, one after another."""
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = dict(model=job["model"], dtype=job["dtype"], enforce_eager=True, disable_log_stats=False, seed=0,
                                    max_model_len=job.get("limit", 512), enable_prefix_caching=False, **job.get("more", {}))
    if job.get("heads"):
        settings["speculative_config"] = {"method": "medusa", "model": job["heads"], "num_speculative_tokens": job["count"],
                                          **job.get("speculative", {})}
    llm = LLM(**settings)
    for run in job["runs"]:
        yield one_run(llm, run.get("prompts") or job["prompts"], run, SamplingParams)


def one_run(llm: Any, prompts: list[list[int]], run: dict[str, Any], params: Any) -> dict[str, Any]:
    together, before = run.get("together") or len(prompts), counters(llm)
    tokens: list[list[int]] = []
    seconds: list[float] = []
    for first in range(0, len(prompts), together):
        asked = [{"prompt_token_ids": prompt} for prompt in prompts[first:first + together]]
        each = [params(temperature=run.get("temperature", 0.0), max_tokens=run["max_tokens"],
                       ignore_eos=run.get("ignore_eos", False)) for _ in asked]
        started = time.perf_counter()
        tokens += [list(output.outputs[0].token_ids) for output in llm.generate(asked, each, use_tqdm=False)]
        seconds.append(time.perf_counter() - started)
    after = counters(llm)
    return {"tokens": tokens, "drafts": after[0] - before[0], "seconds": seconds,
            "accepted": [now - then for now, then in zip(after[1], before[1] or [0] * len(after[1]), strict=True)]}


def counters(llm: Any) -> tuple[int, list[int]]:
    """Drafts verified, and drafted tokens accepted by position, since the start."""
    found = {metric.name: metric for metric in llm.get_metrics()}
    if "vllm:spec_decode_num_drafts" not in found:
        return 0, []
    by_position = found["vllm:spec_decode_num_accepted_tokens_per_pos"]
    return found["vllm:spec_decode_num_drafts"].value, list(by_position.values)


if __name__ == "__main__":
    answers = list(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
