"""Joining a Ray cluster, or starting a local one that ends with the stage."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig, Workers
from pipelines.runtime.faults import one_line
from pipelines.runtime.logs import quieten_driver
from pipelines.runtime.provenance import without_credentials
from pipelines.runtime.ray_access import prepare_to_join, prepare_to_start, worker_environment

MISTAKE, STOPPED = "mistake", "stopped"
"""Columns of a row that holds an actor's InputError, or its StoppedError."""


@contextmanager
def ensure_ray(config: RunConfig) -> Iterator[None]:
    """Connect to Ray inside the block.

    A process that is connected already (a stage inside another one, a test) stays so. Else the address comes from the
    settings, then from RAY_ADDRESS (set inside a submitted job). Without either, a private local instance is started and shut
    down at the end; never `auto`, which could join the cluster of somebody else. Raises StoppedError if an address does not
    answer, InputError if it is none or wants another token.
    """
    if ray.is_initialized():
        yield
        return
    quieten_driver()
    if address := cluster_address(config):
        field = "ray_address" if config.ray_address else "RAY_ADDRESS"
        prepare_to_join(address, field)
        try:
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:  # RuntimeError: another version
            raise StoppedError(f"{field}={address}: cannot be joined ({_words(error)})") from None
        except ValueError:  # not the form of an address: what `ray job submit` takes, or a host without a port
            raise InputError(f"{field}={address}: is no address of a Ray cluster: write it as HOST:6379, without http:// (which "
                             "is the dashboard's, for `ray job submit`)") from None
    else:
        # without a runtime environment: Serve takes that of the driver for a part of a deployment's version
        folder = prepare_to_start()
        try:
            ray.init(address="local", include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING,
                     _temp_dir=str(folder))
        except (ConnectionError, RuntimeError) as error:
            raise StoppedError(f"a local Ray cannot be started ({_words(error)}): its logs are below {folder}") from None
    try:
        with _termination_as_interrupt():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside the block. Ray's own handler, set on connecting, aborts the process with pages of
    stack and leaves to others to end what it has started."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers, and it gets the signals
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def cluster_address(config: RunConfig) -> str | None:
    """The address of the cluster to join; None where a local Ray is started."""
    return config.ray_address or os.environ.get("RAY_ADDRESS") or None


def _words(error: BaseException) -> str:
    """An exception's text in one line: Ray names the versions that do not fit in lines of their own."""
    return without_credentials(" ".join(str(error).split()) or type(error).__name__)[:300]


def check_workers(field: str, workers: Workers, count: int | None = None) -> None:
    """Raise InputError if the cluster is too small for `count` workers (default: `workers.count`), each of which is on one node:
    Ray would wait for ever."""
    count, have = count or workers.count, ray.cluster_resources()
    number = "serve.replicas" if field == "serve.workers" else f"{field}.count"
    for kind, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        if each * count > have.get(kind, 0.0):
            raise InputError(f"{field}: {count} x {each} {kind} are asked for, the cluster has {have.get(kind, 0.0):g}: "
                             f"lower {number} or {field}.{kind.lower()}s")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if (room := sum(workers_on(node, workers, count) for node in nodes)) < count:
        raise InputError(f"{field}: {count} x ({workers.cpus:g} CPU, {workers.gpus:g} GPU) are asked for, the {len(nodes)} nodes "
                         f"of the cluster have room for {room}: lower {number}, {field}.cpus or {field}.gpus")


def workers_on(node: Mapping[str, float], workers: Workers, most: int) -> int:
    """How many of `workers` fit on a node with these resources, at most `most`. Ray counts in ten-thousandths."""
    return min([most, *(round(node.get(kind, 0.0) * 10_000) // round(each * 10_000)
                        for kind, each in (("CPU", workers.cpus), ("GPU", workers.gpus)) if round(each * 10_000))])


def measuring_resources(config: RunConfig) -> dict[str, Any]:
    """Ray options of a task that times decoding: a GPU if the base runs on one, else a share of a CPU."""
    gpus = ray.cluster_resources().get("GPU", 0)
    wants_gpu = config.base.device == "cuda" or (config.base.device == "auto" and gpus >= 1)
    return {"num_cpus": 0.5, "num_gpus": 1 if wants_gpu else 0, "max_retries": 0, **environment_options(config)}


def environment_options(config: RunConfig) -> dict[str, Any]:
    """Ray options of a worker: the variables that it needs of this process, where it does not inherit them."""
    environment = worker_environment(cluster_address(config))
    return {"runtime_env": environment} if environment else {}


def measuring_device(config: RunConfig, asked: str | None = None) -> str:
    """`asked` (default: `base.device`) as far as it is known before a cluster is joined: `auto` is `cpu` on one machine without
    a GPU."""
    device = asked or config.base.device
    if device != "auto" or cluster_address(config) is not None:
        return device
    import torch

    return "auto" if torch.cuda.is_available() else "cpu"


class _ErrorAsRow:
    """An actor that returns an InputError or StoppedError as a row. Raised, it would be lost in pages of Ray Data's traceback."""

    def __init__(self, actor: type, settings: Any, storage: Path) -> None:
        self.error: pa.Table | None = None
        self.storage = storage
        self.actor = self._guarded(lambda: actor(settings))

    def __call__(self, block: pa.Table) -> pa.Table:
        counts = self._guarded(lambda: self.actor(block)) if self.error is None else None
        return counts if self.error is None else self.error

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """The result of `work`; None, and the error as a row in `self.error`, if it raises one that is told in one line."""
        try:
            with one_line(self.storage):
                return work()
        except (InputError, StoppedError) as error:
            self.error = pa.table({MISTAKE if isinstance(error, InputError) else STOPPED: [str(error)]})
            return None


def run_blocks(actor: type, settings: Any, blocks: list[pa.Table], *, actors: int, cpus: float, storage: Path,
               gpus: float = 0, done: Callable[[dict[str, int]], None] | None = None,
               options: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Map `actor(settings)` over `blocks` with a pool of Ray Data actors.

    Actors write their own output and return one row of counts for each block; the result has the sums. `storage`: where they
    write; `done` is called with the counts of each block; `options`: further ones of Ray for the actors. Raises the InputError or
    StoppedError that an actor raised, and StoppedError for a disk that takes no more.
    """
    totals: dict[str, int] = {}
    if not blocks:
        return totals
    ray.data.DataContext.get_current().enable_progress_bars = done is None and sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    mapped = ray.data.from_arrow(blocks).map_batches(
        # one block for each call: all but the last have the same size, and with GPUs Ray Data needs a number
        _ErrorAsRow, fn_constructor_args=(actor, settings, storage), batch_size=max(map(len, blocks)), batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks))), num_cpus=cpus, num_gpus=gpus,
        **(options or {}))
    for row in mapped.iter_rows():
        if MISTAKE in row:
            raise InputError(row[MISTAKE])
        if STOPPED in row:
            raise StoppedError(row[STOPPED])
        counts = {name: int(value) for name, value in row.items()}
        for name, value in counts.items():
            totals[name] = totals.get(name, 0) + value
        if done is not None:
            done(counts)
    return totals
