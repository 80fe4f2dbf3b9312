"""While heads train, a task beside them decodes held-out prompts for real with the newest ones.

Teacher-forced figures come free at every validation; what an engine makes of the same heads is dearer to know, and tells
of faults that they cannot. Training never waits for it, but at its very end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from hydra_core.base import load_base
from hydra_core.decoding import Engine, load_heads
from hydra_core.sampling import Request
from pipelines.config import BaseSection, RunConfig
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.logs import speak
from pipelines.tracking import metric_logger

if TYPE_CHECKING:
    from pipelines.train.context import TrainContext

METRIC = "decoded.tokens_per_step"
LONGEST_WAIT = 300.0
"""Seconds that a finished training waits for the last of them: where no CPU is left to run one, it is never done."""


@dataclass(frozen=True)
class DecodeJob:
    """Plain values that the task is given. `heads`: a checkpoint folder that is its own, removed when it is done."""

    base: BaseSection
    cache: str
    heads: str
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    threads: int


def decode(job: DecodeJob) -> float:
    """Tokens a step after the first, greedily, over all prompts."""
    speak()
    torch.set_num_threads(job.threads)
    try:
        base = load_base(job.base.model, dtype=job.base.dtype, device="cpu", cache=Path(job.cache),
                         context_limit=job.base.context_limit)
        requests = [Request(str(number), prompt, min(job.max_new_tokens, base.context_limit - len(prompt)))
                    for number, prompt in enumerate(job.prompts) if len(prompt) < base.context_limit]
        room = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        engine = Engine(base, *load_heads(job.heads, base), max_batch_size=1, context_limit=room)
        results = engine.generate(requests)
    finally:
        shutil.rmtree(job.heads, ignore_errors=True)
    return sum(len(result.token_ids) - 1 for result in results) / max(sum(result.steps for result in results), 1)


class AsyncEvaluator:
    """The tasks of one training run, started and read on its first rank."""

    def __init__(self, context: TrainContext, say: Callable[[str], None]) -> None:
        self.context, self.say, self.running = context, say, dict[Any, int]()
        self.task = ray.remote(decode).options(num_cpus=context.train.decode_cpus, max_retries=0)

    def after(self, step: int, heads: Path) -> None:
        """Collect what is done; at every `decode_every` steps start another, with a copy of `heads`."""
        self.collect(0.0)
        every = self.context.train.decode_every
        if not every or step // every == (step - self.context.train.validate_every) // every:
            return
        copy = self._copy(step)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(heads, copy)
        self.running[self.task.remote(self._job(copy))] = step

    def end(self, wait: bool) -> None:
        """Log what is done, after a while if `wait`, and end what is not."""
        self.collect(LONGEST_WAIT if wait else 0.0)
        for task, step in self.running.items():
            ray.cancel(task, force=True)
            shutil.rmtree(self._copy(step), ignore_errors=True)
            self.say(f"decoding beside it at step {step} was not done in time: is train.decode_cpus free on the cluster?")
        self.running.clear()

    def collect(self, seconds: float) -> None:
        """Log the figures of tasks that are done within `seconds`. One that failed is told of, and training goes on."""
        if not self.running:
            return
        ready, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=seconds)
        for task in ready:
            step = self.running.pop(task)
            try:
                self._log(step, ray.get(task))
            except ray.exceptions.RayError as error:
                self.say(f"decoding beside it at step {step} failed: {str(error).strip().splitlines()[-1]}")

    def _copy(self, step: int) -> Path:
        return Path(self.context.settings.folder) / f"decode-{step}"

    def _job(self, heads: Path) -> DecodeJob:
        config, store = RunConfig.model_validate(self.context.settings.config), self.context.held_out.store
        rows = store.sample(self.context.train.decode_prompts, self.context.train.seed)
        prompts = tuple(tuple(store.token_ids(int(row))[:store.index.prompt_tokens[row]].tolist()) for row in rows)
        return DecodeJob(config.base, str(RunPaths.of(config).cache), str(heads), prompts, self.context.train.decode_tokens,
                         self.context.train.workers.threads)

    def _log(self, step: int, value: float) -> None:
        settings = self.context.settings
        if settings.tracking_uri is not None and settings.run_id is not None:
            metric_logger(settings.tracking_uri, settings.run_id).log({METRIC: value}, step)
        self.say(f"decoded for real at step {step}: {value:.3f} tokens per step")
