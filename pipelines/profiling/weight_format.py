"""`base.dtype: auto`: which weight format a run's base is loaded in, chosen once and kept for all its stages.

    RUN/base_format.json    digest of the base, the format, milliseconds of a plain step of each that was timed

Heads and configurations carry the format in their base's identity, so a chain must not change it on the way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
import torch
from filelock import FileLock

from hydra_core.base import formats_of, load_base, pick_device, resolve_base
from hydra_core.decoding import read_configuration
from hydra_core.decoding.configuration import ANY_FORMAT
from hydra_core.decoding.configuration import FILE as CONFIGURATION
from pipelines.config import BaseSection, RunConfig
from pipelines.profiling.cost_cache import machine_costs
from pipelines.runtime.artifacts import RunPaths, write_text
from pipelines.runtime.logs import speak
from pipelines.runtime.ray_cluster import ensure_ray, measuring_resources
from pipelines.tracking.lookup import find_model

AUTO = "auto"
FILE = "base_format.json"
ASKED = {"serve": lambda config: config.serve.model, "batch": lambda config: config.serve.model,
         "load": lambda config: config.serve.model, "generate": lambda config: config.generate.model}
"""What stages that decode as a configuration says, in the format it was measured in, are asked to decode with."""


def resolve_format(config: RunConfig, stage: str) -> RunConfig:
    """`config` with a concrete `base.dtype`, and one line on stderr that says how it was chosen.

    A configuration that is served has its own. Else the run's first choice stands; where there is none yet, the formats
    that hold the checkpoint's own values are timed on a Ray worker, if they are more than one. Raises InputError for a
    base or a configuration that cannot be had.
    """
    if config.base.dtype != AUTO:
        return config
    if (served := _served(config, ASKED[stage](config)) if stage in ASKED else None) is not None:
        return _settled(config, served, "as the configuration that is served was measured")
    path = RunPaths.of(config).run / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = resolve_base(config.base.model, RunPaths.of(config).cache).digest
    with FileLock(path.with_name(f".{FILE}.lock")):  # two stages at once choose once
        kept = _read(path)
        if kept is None or kept["base"] != digest:
            dtype, times = sample(_candidates(config))
            kept = {"base": digest, "dtype": dtype, "milliseconds": times}
            write_text(path, json.dumps(kept, indent=2))
    timed = ", ".join(f"{name} {value:.1f} ms" for name, value in kept["milliseconds"].items())
    return _settled(config, kept["dtype"], f"a plain step takes {timed}" if timed else
                    "the one format that holds the checkpoint's own values")


def sample(seconds: dict[str, float | None]) -> tuple[str, dict[str, float]]:
    """The format with the shortest plain step, and the milliseconds of those timed. `seconds`: None where nothing was
    timed, which is where there is one format alone."""
    times = {name: value * 1e3 for name, value in seconds.items() if value is not None}
    return min(times or seconds, key=lambda name: times.get(name, 0.0)), times


def time_formats(base: BaseSection, cache: str, threads: int) -> dict[str, float | None]:
    """Format -> seconds of a plain step of one row on this machine, None for one that has no rival here."""
    speak()
    torch.set_num_threads(threads)
    formats = formats_of(base.model, cache=Path(cache), device=pick_device(base.device).type)
    if len(formats) == 1:
        return {formats[0]: None}
    return {name: machine_costs(load_base(base.model, dtype=name, device=base.device, cache=Path(cache),
                                          context_limit=base.context_limit), Path(cache)).verify_seconds(1, 1)
            for name in formats}


def _candidates(config: RunConfig) -> dict[str, float | None]:
    """As `time_formats`, on a worker of the kind that decodes; with one format even on a CPU no worker is asked."""
    cache = RunPaths.of(config).cache
    formats = formats_of(config.base.model, cache=cache, device="cuda" if config.base.device == "cuda" else "cpu")
    if len(formats) == 1:
        return {formats[0]: None}
    with ensure_ray(config):
        task = ray.remote(time_formats).options(**measuring_resources(config))
        found: dict[str, float | None] = ray.get(task.remote(config.base, str(cache), config.bench.threads))
    return found


def _served(config: RunConfig, asked: str | None) -> str | None:
    """The format of the configuration that is to decode; None for plain decoding or heads, which fix none."""
    folder = find_model(config, asked).folder
    if folder is None or not (folder / CONFIGURATION).exists():
        return None
    dtype = read_configuration(folder).base.weight_format
    return None if dtype == ANY_FORMAT else dtype


def _settled(config: RunConfig, dtype: str, why: str) -> RunConfig:
    print(f"base.dtype={AUTO}: {dtype} ({why})", file=sys.stderr, flush=True)
    return config.model_copy(update={"base": config.base.model_copy(update={"dtype": dtype})})


def _read(path: Path) -> dict[str, Any] | None:
    """What was chosen before, or None where nothing that can be read stands."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept if kept.keys() >= {"base", "dtype", "milliseconds"} else None
    except (OSError, ValueError, AttributeError):
        return None
