"""Joining a Ray cluster, or starting a local one that ends with the stage."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
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
    """Connect to Ray inside the block.

    A process that is connected already (a stage inside another one, a test) stays so. Else the address comes from the
    settings, then from RAY_ADDRESS (set inside a submitted job). Without either, a private local instance is started and shut
    down at the end; never `auto`, which could join the cluster of somebody else. Raises InputError if an address does not
    answer.
    """
    if ray.is_initialized():
        yield
        return
    quieten_driver()
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        field = "ray_address" if config.ray_address else "RAY_ADDRESS"
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        except ConnectionError:
            raise InputError(f"{field}={address}: no Ray cluster answers there") from None
        except ValueError:  # not the form of an address: what `ray job submit` takes, or a host without a port
            raise InputError(f"{field}={address}: is no address of a Ray cluster: write it as HOST:6379, without http:// (which "
                             "is the dashboard's, for `ray job submit`)") from None
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING,
                 runtime_env={"worker_process_setup_hook": "pipelines.runtime.logs.quieten_worker"})
    try:
        yield
    finally:
        ray.shutdown()


def check_workers(field: str, workers: Workers, count: int | None = None) -> None:
    """Raise InputError if the cluster is too small for `count` workers (default: `workers.count`): Ray would wait for ever."""
    count, have = count or workers.count, ray.cluster_resources()
    for kind, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        if each * count > have.get(kind, 0.0):
            number = "serve.replicas" if field == "serve.workers" else f"{field}.count"
            raise InputError(f"{field}: {count} x {each} {kind} are asked for, the cluster has {have.get(kind, 0.0):g}: "
                             f"lower {number} or {field}.{kind.lower()}s")


def measuring_resources(config: RunConfig) -> dict[str, Any]:
    """Ray options of a task that times decoding: a GPU if the base runs on one, else a share of a CPU."""
    gpus = ray.cluster_resources().get("GPU", 0)
    wants_gpu = config.base.device == "cuda" or (config.base.device == "auto" and gpus >= 1)
    return {"num_cpus": 0.5, "num_gpus": 1 if wants_gpu else 0, "max_retries": 0}


class _ErrorAsRow:
    """An actor that returns an InputError as a row. Raised, it would be lost in pages of Ray Data's traceback."""

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
               gpus: float = 0, done: Callable[[dict[str, int]], None] | None = None) -> dict[str, int]:
    """Map `actor(settings)` over `blocks` with a pool of Ray Data actors.

    Actors write their own output and return one row of counts for each block; the result has the sums. `done` is called with
    the counts of each block. Raises the InputError that an actor raised.
    """
    totals: dict[str, int] = {}
    if not blocks:
        return totals
    ray.data.DataContext.get_current().enable_progress_bars = done is None and sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    mapped = ray.data.from_arrow(blocks).map_batches(
        # one block for each call: all but the last have the same size, and with GPUs Ray Data needs a number
        _ErrorAsRow, fn_constructor_args=(actor, settings), batch_size=max(map(len, blocks)), batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks))), num_cpus=cpus, num_gpus=gpus)
    for row in mapped.iter_rows():
        if MISTAKE in row:
            raise InputError(row[MISTAKE])
        counts = {name: int(value) for name, value in row.items()}
        for name, value in counts.items():
            totals[name] = totals.get(name, 0) + value
        if done is not None:
            done(counts)
    return totals
