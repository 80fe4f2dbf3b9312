"""One `VllmEngine` in a process of its own, which vLLM changes for good: threads, signals, memory.

    python -m tests.hydra_core.interop.vllm_engine_runs JOB.json ANSWERS.json

A job: `base`, `dtype`, `cache`, `settings` (of `VllmSettings`), `size` (`max_batch_size`), `heads` (a folder, or null), `runs`.
Each run has `requests` (fields of `Request`), and may have `cancel` (id -> step after which it is cancelled) and `fail` (the step
that raises); it becomes `{"results": {id: fields of Result}, "failed": texts}` or `{"error": text}`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra_core.base import load_vocabulary, load_weightless
from hydra_core.errors import InputError
from hydra_core.interop import VllmEngine, VllmSettings, export_once, speculative_of
from hydra_core.sampling import Request

SMALL = {"kv_cache_gib": 0.25}


def main(job: dict[str, Any]) -> list[dict[str, Any]]:
    cache = Path(job["cache"])
    base = load_weightless(job["base"], dtype=job["dtype"], cache=cache, context_limit=job.get("limit"))
    speculative = None
    if job.get("heads"):
        vocabulary = load_vocabulary(job["base"], dtype=job["dtype"], cache=cache)
        speculative = speculative_of(export_once(job["heads"], vocabulary, cache), job.get("count"))
    settings = VllmSettings(**SMALL | job.get("settings", {}))
    engine = VllmEngine(base, settings, max_batch_size=job["size"], speculative=speculative)
    found = [one_run(engine, run) for run in job["runs"]]
    engine.close()
    return found


def one_run(engine: VllmEngine, run: dict[str, Any]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    failed = None
    try:
        for request in run["requests"]:
            engine.add(Request(**request))
    except InputError as error:
        return {"error": str(error)}
    steps, most = 0, 0
    while engine.has_work:
        most, steps = max(most, engine.running), steps + 1
        if steps == run.get("fail"):
            failed = failure(engine)
            break
        for output in engine.step():
            if output.result is not None:
                values = asdict(output.result)
                results[output.id] = values | {"tokens_per_step": output.result.tokens_per_step}
        for name, after in run.get("cancel", {}).items():
            if after == steps:
                engine.cancel(name)
    return {"results": results, "failed": failed, "most": most, "kv_use": engine.kv_use}


def failure(engine: VllmEngine) -> list[str]:
    """Let a step of vLLM raise; what it and the next one tell. The engine is reset then."""
    def step() -> None:
        raise MemoryError("the GPU fell off the bus")

    engine._engine.step, told = step, []
    for _ in range(2):
        try:
            engine.step()
        except (MemoryError, RuntimeError) as error:
            told.append(str(error))
    engine.reset()
    return told


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), encoding="utf-8")
