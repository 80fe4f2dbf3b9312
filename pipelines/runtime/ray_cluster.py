"""Joining a Ray cluster, or starting a local one that ends with the stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
import ray.data

from hydra_core.errors import InputError
from pipelines.config import RunConfig, Workers
from pipelines.runtime.logs import quieten_driver

MISTAKE = "mistake"


@contextmanager
def ensure_ray(config: RunConfig) -> Iterator[None]:
    """Be connected to Ray inside the block.

    An already connected process (a job inside another stage, a test) is left as it is. Else the address comes from the
    config, then RAY_ADDRESS (set inside a submitted job); without either a private local instance is started, never
    `auto`, which could join a stranger's cluster, and shut down at the end. Raises InputError if an address does not
    answer.
    """
    if ray.is_initialized():
        yield
        return
    quieten_driver()
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=True, logging_level="warning")
        except ConnectionError:
            raise InputError(f"ray_address={address}: no Ray cluster answers there") from None
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=True, logging_level="warning",
                 runtime_env={"worker_process_setup_hook": "pipelines.runtime.logs.quieten_worker"})
    try:
        yield
    finally:
        ray.shutdown()


def check_workers(field: str, workers: Workers, count: int | None = None) -> None:
    """Raise InputError if the cluster can never hold `count` (default: its own) workers: Ray would wait for ever."""
    count, have = count or workers.count, ray.cluster_resources()
    for kind, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        if each * count > have.get(kind, 0.0):
            raise InputError(f"{field}: {count} x {each} {kind} are asked for, the cluster has {have.get(kind, 0.0):g}: "
                             f"lower {field}.count or .{kind.lower()}s")


def measuring_resources(config: RunConfig) -> dict[str, Any]:
    """Ray options of a task that times decoding: a GPU where the base is to run on one, else a share of a CPU."""
    gpus = ray.cluster_resources().get("GPU", 0)
    wants_gpu = config.base.device == "cuda" or (config.base.device == "auto" and gpus >= 1)
    return {"num_cpus": 0.5, "num_gpus": 1 if wants_gpu else 0, "max_retries": 0}


class _Told:
    """An actor whose InputError comes back as a row: one that leaves it is buried in Ray Data's own pages of traceback."""

    def __init__(self, actor: type, settings: Any) -> None:
        self.mistake: str | None = None
        try:
            self.actor = actor(settings)
        except InputError as error:
            self.mistake = str(error)

    def __call__(self, block: pa.Table) -> pa.Table:
        if self.mistake is None:
            try:
                return self.actor(block)
            except InputError as error:
                self.mistake = str(error)
        return pa.table({MISTAKE: [self.mistake]})


def run_blocks(actor: type, settings: Any, blocks: list[pa.Table], *, actors: int, cpus: float,
               gpus: float = 0) -> dict[str, int]:
    """Map `actor(settings)` over `blocks` with a pool of Ray Data actors.

    Actors write their own output and hand back one row of counts a block; returns the sums. Raises the InputError that an
    actor raised.
    """
    totals: dict[str, int] = {}
    if not blocks:
        return totals
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    mapped = ray.data.from_arrow(blocks).map_batches(
        # a block each: all but the last are of one size, and with GPUs Ray Data wants a number
        _Told, fn_constructor_args=(actor, settings), batch_size=max(map(len, blocks)), batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks))), num_cpus=cpus, num_gpus=gpus)
    for row in mapped.iter_rows():
        if MISTAKE in row:
            raise InputError(row[MISTAKE])
        for name, value in row.items():
            totals[name] = totals.get(name, 0) + int(value)
    return totals
