"""Decoding held-out prompts with the newest heads, in a Ray task that runs while training goes on.

Every validation computes teacher-forced figures. Decoding with an engine costs more, and shows faults that teacher forcing
cannot show. Training waits for a task only after its last step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from hydra_core.decoding import Engine, load_heads
from hydra_core.sampling import Request
from pipelines.config import BaseSection, RunConfig
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.faults import first_line
from pipelines.runtime.logs import speak
from pipelines.train.reporting import tracker_of

if TYPE_CHECKING:
    from pipelines.train.context import TrainContext

METRIC = "decoded.tokens_per_step"
LONGEST_WAIT = 300.0
"""Seconds that a finished training waits for its last tasks: a task that gets no CPU never ends."""


@dataclass(frozen=True)
class DecodeJob:
    """Plain values for the task. `heads`: a checkpoint folder for this task alone, which it removes at its end."""

    base: BaseSection
    cache: str
    heads: str
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    threads: int


def decode(job: DecodeJob) -> float:
    """Decode all prompts greedily; returns tokens per step, the first token of each answer not counted."""
    speak()
    torch.set_num_threads(job.threads)
    try:
        base = job.base.load(job.cache, device="cpu")
        requests = [Request(str(number), prompt, min(job.max_new_tokens, base.context_limit - len(prompt)))
                    for number, prompt in enumerate(job.prompts) if len(prompt) < base.context_limit]
        room = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        engine = Engine(base, *load_heads(job.heads, base), max_batch_size=1, context_limit=room)
        results = engine.generate(requests)
    finally:
        shutil.rmtree(job.heads, ignore_errors=True)
    return sum(len(result.token_ids) - 1 for result in results) / max(sum(result.steps for result in results), 1)


class AsyncEvaluator:
    """The decoding tasks of one training run. Its first rank starts them and collects their results."""

    def __init__(self, context: TrainContext, say: Callable[[str], None]) -> None:
        self.context, self.say, self.running = context, say, dict[Any, int]()
        self.task = ray.remote(decode).options(num_cpus=context.train.decode_cpus, max_retries=0)

    def after(self, step: int, heads: Path) -> None:
        """Collect finished tasks; every `decode_every` steps start another one, with a copy of `heads`."""
        self.collect(0.0)
        every = self.context.train.decode_every
        if not every or step // every == (step - self.context.train.validate_every) // every:
            return
        copy = self._copy(step)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(heads, copy)
        self.running[self.task.remote(self._job(copy))] = step

    def end(self, wait: bool) -> None:
        """Collect finished tasks, with `wait` also those that finish soon, and cancel the others."""
        self.collect(LONGEST_WAIT if wait else 0.0)
        for task, step in self.running.items():
            ray.cancel(task, force=True)
            shutil.rmtree(self._copy(step), ignore_errors=True)
            self.say(f"the decoding task of step {step} did not end in time: does the cluster have train.decode_cpus free?")
        self.running.clear()

    def collect(self, seconds: float) -> None:
        """Log the figures of tasks that end within `seconds`. The failure of a task is reported, and training goes on."""
        if not self.running:
            return
        ready, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=seconds)
        for task in ready:
            step = self.running.pop(task)
            try:
                self._log(step, ray.get(task))
            except ray.exceptions.RayError as error:
                self.say(f"the decoding task of step {step} failed: {str(error).strip().splitlines()[-1]}")

    def _copy(self, step: int) -> Path:
        return Path(self.context.settings.folder) / f"decode-{step}"

    def _job(self, heads: Path) -> DecodeJob:
        config, store = RunConfig.model_validate(self.context.settings.config), self.context.held_out.store
        rows = store.sample(self.context.train.decode_prompts, self.context.train.seed)
        prompts = tuple(tuple(store.token_ids(int(row))[:store.index.prompt_tokens[row]].tolist()) for row in rows)
        return DecodeJob(config.base, str(RunPaths.of(config).cache), str(heads), prompts, self.context.train.decode_tokens,
                         self.context.train.workers.threads)

    def _log(self, step: int, value: float) -> None:
        try:
            if (logger := tracker_of(self.context)) is not None:
                logger.log({METRIC: value}, step)
        except Exception as error:  # each kind of store raises its own exceptions, and none is worth the training
            self.say(f"{METRIC} of step {step} is not logged: {first_line(error)}")
        self.say(f"decoded with the heads of step {step}: {value:.3f} tokens per step")
