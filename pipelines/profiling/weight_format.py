"""`base.dtype: auto`: the weight format that a run's base is loaded in, chosen once and used by all stages of the run.

    RUN/base_format.json    digest of the base, the format, milliseconds of a plain step in each format that was timed

Heads and configurations carry the format in the identity of their base, so it must not change between stages.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import torch

from hydra_core.base import formats_of, pick_device, resolve_base
from hydra_core.decoding import read_configuration
from hydra_core.decoding.configuration import ANY_FORMAT
from hydra_core.decoding.configuration import FILE as CONFIGURATION
from hydra_core.files import file_lock
from hydra_core.storage import is_remote
from pipelines.config import BaseSection, RunConfig
from pipelines.profiling.cost_cache import machine_costs
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.console import say
from pipelines.runtime.files import write_text
from pipelines.runtime.logs import speak
from pipelines.runtime.ray_cluster import ensure_ray, measuring_resources
from pipelines.tracking.lookup import find_model

AUTO = "auto"
FILE = "base_format.json"
ASKED = {"serve": lambda config: config.serve.model, "batch": lambda config: config.serve.model,
         "load": lambda config: config.serve.model, "generate": lambda config: config.generate.model}
"""Stage -> the model that its settings name, for stages that decode with a configuration and in its weight format."""


def resolve_format(config: RunConfig, stage: str) -> RunConfig:
    """Return `config` with a concrete `base.dtype`, and print one line on stderr that says why this one.

    A configuration that is served has its own format. Else the run keeps its first choice. In a run without a choice, the
    formats that hold the checkpoint's own values are timed on a Ray worker, if there are several. Raises InputError for a base
    or a configuration that cannot be loaded.
    """
    if config.base.dtype != AUTO:
        return config
    if (served := _served(config, stage) if stage in ASKED else None) is not None:
        return _with_format(config, served, "the format in which the served configuration was measured")
    path = RunPaths.of(config).run / FILE
    lock = file_lock(path.with_name(f".{FILE}.lock")) if not is_remote(path) else nullcontext()
    if not is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    digest = resolve_base(config.base.model, RunPaths.of(config).cache).digest
    with lock:  # of two stages at the same time, one chooses
        kept = _read(path)
        if kept is None or kept["base"] != digest:
            dtype, times = fastest_format(_candidates(config))
            kept = {"base": digest, "dtype": dtype, "milliseconds": times}
            write_text(path, json.dumps(kept, indent=2))
    timed = ", ".join(f"{name} {value:.1f} ms" for name, value in kept["milliseconds"].items())
    return _with_format(config, kept["dtype"], f"a plain step takes {timed}" if timed else
                    "the one format that holds the checkpoint's own values")


def fastest_format(seconds: dict[str, float | None]) -> tuple[str, dict[str, float]]:
    """The format with the shortest plain step, and the milliseconds of each format that was timed.

    `seconds`: format -> seconds of a step; None for a format that was not timed because it is the only one.
    """
    times = {name: value * 1e3 for name, value in seconds.items() if value is not None}
    return min(times or seconds, key=lambda name: times.get(name, 0.0)), times


def time_formats(base: BaseSection, cache: str, threads: int) -> dict[str, float | None]:
    """Format -> seconds of a plain step of one sequence on this machine, None if there is only one format."""
    speak()
    torch.set_num_threads(threads)
    formats = formats_of(base.model, cache=Path(cache), device=pick_device(base.device).type)
    if len(formats) == 1:
        return {formats[0]: None}
    return {name: machine_costs(base.load(cache, dtype=name), Path(cache)).verify_seconds(1, 1) for name in formats}


def _candidates(config: RunConfig) -> dict[str, float | None]:
    """`time_formats` on a Ray worker of the kind that decodes; without a worker where a CPU has one format only."""
    cache = RunPaths.of(config).cache
    formats = formats_of(config.base.model, cache=cache, device="cuda" if config.base.device == "cuda" else "cpu")
    if len(formats) == 1:
        return {formats[0]: None}
    with ensure_ray(config):
        task = ray.remote(time_formats).options(**measuring_resources(config))
        found: dict[str, float | None] = ray.get(task.remote(config.base, str(cache), config.bench.threads))
    return found


def _served(config: RunConfig, stage: str) -> str | None:
    """The format of the configuration that decodes; None for plain decoding and for heads, which are not bound to one."""
    field = "generate.model" if stage == "generate" else "serve.model"
    folder = find_model(config, ASKED[stage](config), field).folder
    if folder is None or not (folder / CONFIGURATION).exists():
        return None
    dtype = read_configuration(folder).base.weight_format
    return None if dtype == ANY_FORMAT else dtype


def _with_format(config: RunConfig, dtype: str, why: str) -> RunConfig:
    say(f"base.dtype={AUTO}", f"{dtype} ({why})")
    return config.model_copy(update={"base": config.base.model_copy(update={"dtype": dtype})})


def _read(path: Path) -> dict[str, Any] | None:
    """The earlier choice of this run, or None if there is no readable one."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept if kept.keys() >= {"base", "dtype", "milliseconds"} else None
    except (OSError, ValueError, AttributeError):
        return None
