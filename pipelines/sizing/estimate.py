"""The sizes of a stage's parts, from the settings, the base's shape and the machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.dry_run import CHAIN
from pipelines.sizing.amounts import StageSize
from pipelines.sizing.base import BaseShape, NotHere, shape_of
from pipelines.sizing.distilling import distill_size
from pipelines.sizing.hardware import Surroundings, find_surroundings
from pipelines.sizing.limits import check_fits
from pipelines.sizing.pace import Pace, pace_of
from pipelines.sizing.report import WITHOUT_BASE, Plan
from pipelines.sizing.rows import RowCounts, finished_rows, planned_rows
from pipelines.sizing.serving import batch_size, bench_size, generate_size, load_size, serve_size, tree_size
from pipelines.sizing.training import train_size
from pipelines.sizing.vllm import in_vllm

Decoding = Callable[[RunConfig, BaseShape, Pace | None, str, bool], StageSize]
DECODING: dict[str, Decoding] = {"serve": serve_size, "batch": batch_size, "load": load_size, "generate": generate_size,
                                 "tree": tree_size, "bench": bench_size}


def estimate(config: RunConfig, stage: str, steps: list[str]) -> Plan:
    """The plan with sizes, or with the reason why there are none. Raises InputError for what cannot fit."""
    try:
        base = shape_of(config.base.model, config.base.dtype, config.base.context_limit, RunPaths.of(config).cache)
    except NotHere as error:
        return Plan(stage, steps, {}, [], f"base.model={config.base.model}: {error}")
    around = find_surroundings(config)
    whole = {"quickstart": CHAIN, "loop": ("distill", "train", "tree", "bench")}.get(stage, (stage,))
    names = [name for name in whole if name not in WITHOUT_BASE]
    sizes = [size for name in names for size in stage_sizes(config, name, base, around)]
    if around.local:
        sizes = [replace(size, network={}) for size in sizes]
    return Plan(stage, steps, base_figures(base), check_fits(sizes, around))


def stage_sizes(config: RunConfig, stage: str, base: BaseShape, around: Surroundings) -> list[StageSize]:
    """The sizes of one stage: one, or one for each drafter or variant that is trained."""
    gpu = uses_gpu(config, stage, around)
    pace, why = pace_of(base, gpu, around.gpu, RunPaths.of(config).cache)
    if stage in DECODING:
        return [in_vllm(config, DECODING[stage](config, base, pace, why, gpu), base, gpu)]
    rows = planned_rows(config) if stage == "distill" else finished_rows(config) or planned_rows(config)
    if stage == "distill":
        return [in_vllm(config, distill_size(config, base, rows, pace, why, gpu), base, gpu)]
    nodes = around.nodes if around.memory is not None else config.train.workers.least
    if stage == "train":
        if config.train.dry_run:
            return []
        return [train_size(config, name, base, rows, pace, why, nodes) for name in config.train.drafters
                if config.train.only in (None, name)]
    if stage == "curve":
        return _points(config, base, rows, pace, why, nodes)
    return _variants(config, base, rows, pace, why, nodes)


def _points(config: RunConfig, base: BaseShape, rows: RowCounts, pace: Pace | None, why: str, nodes: int) -> list[StageSize]:
    """Each training of `curve`, one after the other."""
    train, found = config.train, []
    for name in config.curve.drafters or ((train.only,) if train.only else tuple(train.drafters)):
        for share in sorted(config.curve.shares):
            part = f"{name} x {share:g}"
            own = {"share": share * train.share, "drafters": {part: train.drafters[name]}, "only": None, "start": {}}
            varied = config.model_copy(update={"train": train.model_copy(update=own)})
            found += [train_size(varied, part, base, rows, pace, why, nodes)] * len(config.curve.seeds)
    return found


def _variants(config: RunConfig, base: BaseShape, rows: RowCounts, pace: Pace | None, why: str,
              nodes: int) -> list[StageSize]:
    """Each training of `ablate`, one after the other. Of a search those with the settings as they are, none stopped early."""
    if config.ablate.space:
        own = config.train.only or next(iter(config.train.drafters))
        return [train_size(config, own, base, rows, pace, why, nodes)] * (config.ablate.trials + config.ablate.best_seeds)
    found = []
    for name, variant in config.ablate.variants.items():
        changes = {"share": variant.share or config.train.share, "epochs": variant.epochs or config.train.epochs,
                   "drafters": {name: variant.heads}, "only": None, "start": {}}
        varied = config.model_copy(update={"train": config.train.model_copy(update=changes)})
        found += [train_size(varied, name, base, rows, pace, why, nodes)] * len(variant.seeds)
    return found


def uses_gpu(config: RunConfig, stage: str, around: Surroundings) -> bool:
    """Whether the workers of a stage use a GPU, as far as the settings tell: those that reserve one, those of a base on `cuda`,
    and those that measure wherever there is one."""
    section = {"batch": "serve", "load": "serve", "ablate": "train", "curve": "train"}.get(stage, stage)
    workers = getattr(getattr(config, section), "workers", None)  # of bench, tree and generate there are none
    if workers is not None and workers.gpus > 0:
        return True
    if stage in ("train", "ablate", "curve"):
        return False
    if workers is not None:
        return config.base.device == "cuda"
    on_gpus = around.device is not None or ("cluster" in config.model_fields_set and config.cluster.gpus > 0)
    return config.base.device == "cuda" or (config.base.device == "auto" and on_gpus)


def base_figures(base: BaseShape) -> dict[str, str | int]:
    """What all other numbers follow from."""
    return {"name": base.name, "dtype": base.dtype, "parameters": base.parameters, "weight_bytes": base.weight_bytes(),
            "kv_bytes_a_token": base.kv_bytes, "hidden_bytes_a_token": base.width * base.item, "context": base.limit}
