"""Decoding held-out prompts with the newest heads while training goes on: Ray Train's own validation of checkpoints.

Every validation computes teacher-forced figures. Decoding with an engine costs more, and shows faults that teacher forcing
cannot show. Ray Train's controller starts the function here for one checkpoint after the other, keeps each until it is decoded,
goes on with those that are left when a training is resumed, and waits for them at the end, when the workers have given their
room back. A function that fails would end the training, so the decoding is a task of its own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.train.v2.api.validation_config import ValidationConfig, ValidationTaskConfig

from hydra_core.storage import as_path
from pipelines.config import RunConfig, TrainSection
from pipelines.distill.union import other_rows
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line
from pipelines.runtime.logs import speak
from pipelines.runtime.ray_access import worker_environment
from pipelines.runtime.ray_cluster import cluster_address
from pipelines.train.context import HEADS, LoopSettings

METRIC = "decoded.tokens_per_step"
LONGEST_SECONDS = 1800.0
"""After which a decoding is given up: it hangs, or there is no room for it."""


def decoding_of(config: RunConfig, settings: LoopSettings) -> ValidationConfig | None:
    """What Ray Train needs to decode beside the training; None where no decoding is asked for. Call it in a cluster."""
    train = config.train
    if not train.decode_every:
        return None
    gpus = spare_gpus(config) if train.decode_gpus is None else train.decode_gpus
    values = {"settings": asdict(settings), "gpus": gpus}
    return ValidationConfig(decode_heads, ValidationTaskConfig(fn_kwargs=values, timeout_s=LONGEST_SECONDS), {
        "num_cpus": 0, "runtime_env": worker_environment(cluster_address(config))})


def spare_gpus(config: RunConfig) -> int:
    """1 if the training uses GPUs and leaves one of the cluster's free, and the base may run on it, else 0."""
    workers = config.train.workers
    left = ray.cluster_resources().get("GPU", 0.0) - workers.most * workers.gpus
    return int(workers.gpus > 0 and left >= 1 and config.base.device != "cpu")


def is_due(train: TrainSection, step: int) -> bool:
    """Whether the heads that are validated after `step` steps are decoded with: about every `decode_every` steps."""
    every = train.decode_every
    return bool(every) and step // every != (step - train.validate_every) // every


def decode_heads(checkpoint: Any, **given: Any) -> dict[str, float]:
    """Decode with the heads of `checkpoint` in a task that reserves what it uses, and log the result at their step.

    `given`: `settings`, the fields of LoopSettings, and `gpus`, how many the task reserves. Returns what Ray Train adds to the
    metrics of the checkpoint. A failure is told in a line, and returns nothing.
    """
    speak()
    loop, gpus = LoopSettings(**given["settings"]), given["gpus"]
    train = RunConfig.model_validate(loop.config).train
    task = ray.remote(decode).options(num_cpus=train.decode_cpus, num_gpus=gpus, max_retries=0)
    try:
        step, value = ray.get(task.remote(checkpoint, loop, "cuda" if gpus else "cpu"))
    except ray.exceptions.RayError as error:
        say(f"train {loop.drafter}", f"a decoding beside the training failed: {str(error).strip().splitlines()[-1]}")
        return {}
    _log(loop, step, value)
    return {METRIC: value}


def decode(checkpoint: Any, loop: LoopSettings, device: str) -> tuple[int, float]:
    """Decode the prompts of some held-out rows greedily with the heads of `checkpoint`.

    Returns the step of the heads, and tokens per step, the first token of each answer not counted.
    """
    import torch

    from hydra_core.decoding import Engine, load_heads
    from hydra_core.sampling import Request
    from pipelines.rows.feature_store import FeatureStore

    speak()
    config = RunConfig.model_validate(loop.config)
    train, store = config.train, FeatureStore.open(as_path(loop.held_out), "held_out", also=other_rows(config))
    torch.set_num_threads(train.workers.threads)
    base = config.base.load(RunPaths.of(config).cache, device=device)
    requests = []
    for row in store.sample(train.decode_prompts, train.seed):
        prompt = tuple(store.token_ids(int(row))[:store.index.prompt_tokens[row]].tolist())
        if len(prompt) < base.context_limit:
            requests.append(Request(str(row), prompt, min(train.decode_tokens, base.context_limit - len(prompt))))
    room = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    with checkpoint.as_directory() as folder:
        heads = Path(folder) / HEADS
        step = int(json.loads((heads / "provenance.json").read_text(encoding="utf-8"))["training"]["step"])
        engine = Engine(base, *load_heads(heads, base), max_batch_size=1, context_limit=room)
    results = engine.generate(requests)
    return step, sum(len(result.token_ids) - 1 for result in results) / max(sum(result.steps for result in results), 1)


def _log(loop: LoopSettings, step: int, value: float) -> None:
    name = f"train {loop.drafter}"
    if loop.run_id is not None and loop.tracking_uri is not None:
        from pipelines.tracking import log_or_keep

        try:
            log_or_keep(RunConfig.model_validate(loop.config), loop.tracking_uri, loop.run_id, {METRIC: value}, step)
        except Exception as error:  # each kind of store raises its own exceptions, and none is worth the training
            say(name, f"{METRIC} of step {step} is not logged: {first_line(error)}")
    say(name, f"decoded with the heads of step {step}: {value:.3f} tokens per step")
