"""The `train` stage: every drafter on the distilled rows, by Ray Train's TorchTrainer with DeepSpeed ZeRO inside."""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import ScalingConfig

from hydra_core.base import BaseVocabulary, load_vocabulary
from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab
from hydra_core.storage import arrow_files, as_path, is_remote
from pipelines.config import RunConfig
from pipelines.distill.stage import answered, distilled
from pipelines.distill.union import other_rows
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.row_index import RowStore
from pipelines.runtime.artifacts import (
    RunPaths,
    StageFolder,
    StageResult,
    earlier_bases,
    fingerprint,
    finished,
    recorded,
    stage_folder,
)
from pipelines.runtime.files import copy_file, copy_folder, remove_file, remove_tree
from pipelines.runtime.lock import only_run
from pipelines.runtime.provenance import provenance
from pipelines.runtime.ray_access import worker_environment
from pipelines.runtime.ray_cluster import check_workers, cluster_address, ensure_ray
from pipelines.runtime.tables import Table
from pipelines.runtime.usage import time_of_steps
from pipelines.tracking import Tracker
from pipelines.tracking.models import OUTPUT, TrackedModel, finish_model, heads_model
from pipelines.train.async_eval import decoding_of
from pipelines.train.context import CURVE, HEADS, LAST, LOGGED, LoopSettings
from pipelines.train.deepspeed_config import check_toolchain
from pipelines.train.divergence import STOPPED, raise_if_stopped
from pipelines.train.elastic import RESIZE_SECONDS
from pipelines.train.halving import HALTED, Halving, halted_step
from pipelines.train.loop import total_steps, train_loop, training_rows
from pipelines.train.ray_train import HeadTrainer, NodeTorchConfig
from pipelines.train.reporting import log_rest, read_curve
from pipelines.train.untrained import run_dry
from pipelines.train.warm_start import check_start, start_digest

STAGE = "train"
STATE = "state"
"""Folder of Ray's checkpoints inside a drafter's stage folder; removed when its heads are written."""
EXECUTION_FIELDS = {"drafters", "only", "max_failures", "dry_run", "stop_ratio", "decode_every",
                    "decode_prompts", "decode_tokens", "decode_cpus", "decode_gpus", "start", "workers", "also"}
"""Settings that do not change the heads, or that are part of a drafter's own fingerprint."""


def run_train(config: RunConfig, halving: Halving | None = None) -> StageResult:
    """Train every drafter of `train.drafters`, or `train.only`, that is not finished yet.

    `halving`: how a trial of a search is compared with the others, which may stop it. Outputs: drafter -> heads folder. Figures:
    drafter -> tokens per step, top-1 per head, coverage, steps, seconds; `stopped_step` of a trial that was stopped.
    Raises InputError for features that are missing or of another base, a missing toolchain or a cluster that is too small;
    StoppedError for a loss that is not finite or explodes.
    """
    names = [config.train.only] if config.train.only else list(config.train.drafters)
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
            raise InputError(f"train.drafters: {name!r} cannot name a folder: use letters, digits and . _ + -")
    if config.train.dry_run:
        return run_dry(config, names)
    tracker = Tracker.open(config)
    features, data_digest = distilled(config)
    rows = features
    if config.train.features == "online":
        rows, data_digest = answered(config)
    results: dict[str, StageResult] = {}
    todo = []
    for name in names:
        done = finished(RunPaths.of(config).stage(STAGE, name), _fingerprint(config, name, data_digest),
                        _earlier_fingerprints(config, name, data_digest))
        results |= {name: done} if done else {}
        todo += [] if done else [name]
    if todo:
        check_toolchain(config.train.workers.gpus > 0)
        vocabulary = _check_data(config, rows, features)
        for name in todo:
            check_start(config, name, vocabulary)
        _shorten_waits(config)
        with ensure_ray(config):
            check_workers("train.workers", config.train.workers)
            for name in todo:
                results[name] = _train_one(config, name, (rows, features), data_digest, vocabulary, tracker, halving)
    return StageResult(
        STAGE, tracker.parent(),
        outputs={name: results[name].outputs[HEADS] for name in names},
        figures={name: results[name].figures for name in names}, skipped=all(result.skipped for result in results.values()))


def _shorten_waits(config: RunConfig) -> None:
    """Set environment variables of Ray Train, which it hands to its controller, unless the user has set them.

    The controller polls its workers every 2 s by default, so that a short training waits for it at the start, at every report
    and at the end. A local Ray has no nodes that can be preempted, and so needs no actor that watches for it.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if config.train.workers.most > config.train.workers.least:  # a node that has just died is asked for room until then
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    if cluster_address(config) is None:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def build_trainer(config: RunConfig, settings: LoopSettings, state: Path, name: str) -> TorchTrainer:
    """A trainer that is not started yet.

    `state` is its storage. `name` must be different for other settings or data: Ray continues from what it finds there.
    """
    train = config.train
    files, place = arrow_files(state) if is_remote(state) else (None, str(state))
    uses_gpu = train.workers.gpus > 0
    resources = {"CPU": train.workers.cpus} | ({"GPU": train.workers.gpus} if uses_gpu else {})
    return HeadTrainer(
        train_loop,
        train_loop_config=asdict(settings),
        validation_config=decoding_of(config, settings),
        torch_config=NodeTorchConfig(backend="nccl" if uses_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.workers.count, use_gpu=uses_gpu, resources_per_worker=resources,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS),
        run_config=RayRunConfig(
            name=name, storage_path=place, storage_filesystem=files,
            worker_runtime_env=worker_environment(cluster_address(config)),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # typed as the old RunConfig
            failure_config=FailureConfig(max_failures=train.max_failures),
            # The best one. Ray keeps the last one besides, from which it would resume.
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="tokens_per_step",
                                               checkpoint_score_order="max")))


def _train_one(config: RunConfig, name: str, data: tuple[Path, Path], data_digest: str, vocabulary: BaseVocabulary,
               tracker: Tracker, halving: Halving | None = None) -> StageResult:
    """Train one drafter; `data`: folders of the training rows and of the features that validation reads."""
    rows, features = data
    folder, wanted = RunPaths.of(config).stage(STAGE, name), _fingerprint(config, name, data_digest)
    with ExitStack() as held:
        held.enter_context(only_run(folder, as_path(config.storage)))
        earlier = _earlier_fingerprints(config, name, data_digest)
        if (done := finished(folder, wanted, earlier)) is not None:  # by the run that held the lock until now
            return done
        stage = held.enter_context(stage_folder(config, STAGE, folder, wanted, earlier=earlier,
                                                settings=_named_settings(config, name)))
        store = training_rows(config, rows)
        coverage = _coverage(config, name, store, vocabulary)
        with tracker.start(STAGE, part=name, fingerprint=wanted) as run, heads_model(run, config, name) as model:
            run.log_dataset("features", data_digest, str(rows), "training")
            run.log_metrics({"draft_vocab_coverage": coverage})
            settings = LoopSettings(config.model_dump(mode="json", by_alias=True), name, str(rows), str(features),
                                    str(folder), tracker.uri, run.run_id, provenance(config) | {
                                        "data_digest": data_digest, "start_digest": start_digest(config, name)},
                                    asdict(halving) if halving else None)
            for left in (STOPPED, HALTED):
                remove_file(folder / left)
            result = build_trainer(config, settings, folder / STATE, f"{name}-{stage.fingerprint[:16]}").fit()
            raise_if_stopped(folder, name, result.checkpoint)
            steps = total_steps(config.train, store)
            learned = int(store.index.lengths.sum() - store.index.prompt_tokens.sum())
            return _finish(stage, name, result, model, data_digest,
                           {"coverage": coverage, "steps": steps, "response_tokens": learned})


def _finish(stage: StageFolder, name: str, result: Any, model: TrackedModel, data_digest: str,
            figures: dict[str, Any]) -> StageResult:
    """Write the heads of the best checkpoint, the heads and curve of the last one, and then the manifest."""
    folder = stage.folder
    best, metrics = max(result.best_checkpoints, key=lambda pair: (pair[1]["tokens_per_step"], -pair[1]["step"]))
    with best.as_directory() as source:
        copy_folder(Path(source) / HEADS, folder / HEADS)
    with result.checkpoint.as_directory() as source:
        copy_file(Path(source) / CURVE, folder / CURVE)
        copy_folder(Path(source) / HEADS, folder / LAST)
    if (halted := halted_step(folder)) is not None:
        figures["stopped_step"] = halted
        model.run.log_metrics({"stopped_step": halted})
    heads = sum(1 for key in metrics if re.fullmatch(r"head\d+_top1", key))
    figures |= {
        "tokens_per_step": round(metrics["tokens_per_step"], 4),
        "top1": [round(metrics[f"head{head}_top1"], 4) for head in range(heads)],
        "best_step": metrics["step"], "seconds": round(time.time() - stage.started, 1),
        **time_of_steps(read_curve(folder / CURVE), stage.config.train.workers.gpus).figures()}
    log_rest(model.run, folder, folder / CURVE)
    _record(stage.config, name, model, data_digest, metrics, figures)
    finish_model(model, stage.config, folder / HEADS)
    model.run.log_artifact(folder / CURVE)
    done = StageResult(STAGE, model.run.run_id, {HEADS: str(folder / HEADS), LAST: str(folder / LAST),
                                                 "curve": str(folder / CURVE), OUTPUT: model.uri}, figures)
    stage.finish(done, [*(folder / HEADS).iterdir(), *(folder / LAST).iterdir(), folder / CURVE])
    remove_tree(folder / STATE)  # optimizer state: many times the heads, and not needed any more
    remove_file(folder / LOGGED)
    return done


def _record(config: RunConfig, name: str, model: TrackedModel, data_digest: str, metrics: dict[str, Any],
            figures: dict[str, Any]) -> None:
    """Write what MLflow shows of a training: the held-out figures of the best checkpoint, and a description."""
    run = model.run
    run.log_model_metrics(model.model_id, {"tokens_per_step": metrics["tokens_per_step"]}, "features", data_digest)
    kept = {key: float(value) for key, value in metrics.items() if key in ("tokens_per_step", "step") or key.endswith("_top1")}
    run.log_metrics({f"best.{key}": value for key, value in kept.items()} | {"tokens_per_step": kept["tokens_per_step"]})
    epochs = config.train.epochs
    table = Table(("response tokens", "epochs", "steps", "best step", "top-1 by head", "coverage of the draft vocabulary"), [
        (f"{figures['response_tokens']:,}", f"{epochs:g}", str(figures["steps"]), str(figures["best_step"]),
         " / ".join(f"{top:.3f}" for top in figures["top1"]), f"{figures['coverage']:.3f}")])
    run.describe(f"{name}: {figures['tokens_per_step']:.3f} tokens per step on held-out rows", table.markdown())
    run.log_headline({"training_tokens": figures["response_tokens"]})


def _settings(config: RunConfig, name: str) -> dict[str, Any]:
    """The settings that decide the heads of one drafter. Of the base they are those that change what it computes: the rows say
    which base it is, wherever it lies."""
    train = config.train.model_dump(mode="json", by_alias=True, exclude=EXECUTION_FIELDS)
    heads = config.train.drafters[name].model_dump(mode="json")
    later = ("recurrent", "skip_bias", "own_rows", "taps")
    for values, since in (*((heads, name) for name in later), (train, "validation_seed")):
        if values[since] is None or values[since] is False:
            del values[since]  # trainings from before this field keep their fingerprint
    return {"train": train, "heads": heads, "base": config.base.model_dump(mode="json", include={"dtype", "context_limit"})}


def _named_settings(config: RunConfig, name: str) -> dict[str, Any]:
    """The same, under the names that a user gives."""
    settings = _settings(config, name)
    train = settings["train"] | {"drafters": {name: settings["heads"]}}
    return {"train": train, "base": settings["base"]}


def _fingerprint(config: RunConfig, name: str, data_digest: str) -> str:
    return _digest_of(_settings(config, name), name, data_digest, start_digest(config, name))


def _earlier_fingerprints(config: RunConfig, name: str, data_digest: str) -> set[str]:
    """Those that earlier versions gave to this training: they held the number of workers, and the base's path and device too."""
    settings, start = _settings(config, name), start_digest(config, name)
    folder = RunPaths.of(config).stage(STAGE, name)
    counts = {config.train.workers.most, recorded(folder).get("train.workers.count")} - {None}
    return {_digest_of(settings | {"base": base, "train": settings["train"] | {"workers": count}}, name, data_digest, start)
            for base in (settings["base"], *earlier_bases(config, folder)) for count in counts}


def _digest_of(settings: dict[str, Any], name: str, data_digest: str, start: str | None) -> str:
    return fingerprint(STAGE, settings | {"drafter": name}, {"distill": data_digest} | ({"start": start} if start else {}))


def _check_data(config: RunConfig, rows: Path, features: Path) -> BaseVocabulary:
    """Check that both splits exist and are made by this base, before any worker starts. Raises InputError."""
    vocabulary = load_vocabulary(config.base.model, dtype=config.base.dtype, cache=RunPaths.of(config).cache)
    held_out = FeatureStore.open(features, "held_out", also=other_rows(config))
    for folder, store in ((rows, training_rows(config, rows)), (features, held_out)):
        if store.base != str(vocabulary.identity):
            raise InputError(f"{folder}: rows were made by base {store.base}, not {vocabulary.identity}: "
                             "use that base or distill again")
        if isinstance(store, FeatureStore) and store.width != vocabulary.width:
            raise InputError(f"{folder}: hidden states are {store.width} wide, the base is {vocabulary.width}")
    return vocabulary


def _coverage(config: RunConfig, name: str, store: RowStore, vocabulary: BaseVocabulary) -> float:
    counts = store.response_counts(vocabulary.size)
    size = config.train.drafters[name].draft_vocab_size
    return round(DraftVocab.rank(counts, size, vocabulary.stop_ids).coverage(counts), 5)
