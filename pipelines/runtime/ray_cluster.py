"""Joining a Ray cluster, or starting a local one that ends with the stage."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray.data

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import as_path
from pipelines.config import Reserved, RunConfig, TrainWorkers, Workers
from pipelines.runtime.autoscaling import comes_when_asked, fits, may_grow, wait_for_room
from pipelines.runtime.console import say
from pipelines.runtime.logs import quieten_driver
from pipelines.runtime.provenance import without_credentials
from pipelines.runtime.ray_access import prepare_to_join, prepare_to_start, worker_environment
from pipelines.runtime.stores import check_every_node


@contextmanager
def ensure_ray(config: RunConfig) -> Iterator[None]:
    """Connect to Ray inside the block.

    A process that is connected already (a stage inside another one, a test) stays so. Else the address comes from the
    settings, then from RAY_ADDRESS (set inside a submitted job). Without either, a private local instance is started and shut
    down at the end; never `auto`, which could join the cluster of somebody else. Raises StoppedError if an address does not
    answer, InputError if it is none or wants another token, and for a node of the cluster that does not see the storage.
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
            if address:
                check_every_node("storage", as_path(config.storage), environment_options(config))
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


def check_workers(field: str, workers: Workers | TrainWorkers, count: int | None = None) -> None:
    """Raise InputError if the cluster is too small for `count` workers (default: the fewest that do), each of which is on one
    node: Ray would wait for ever, and silently. Where an autoscaler may start nodes, it is asked.

    Returns when there is room for the first of a pool of actors, with a line a minute until then. Training says itself what it
    waits for, since its workers all start at once.
    """
    count, stage = count or (workers.least if isinstance(workers, TrainWorkers) else workers.count), field.split(".")[0]
    if (fault := _what_is_missing(field, workers, count)) is not None:
        if not may_grow():
            raise InputError(fault)
        say(stage, f"{count} workers of {workers.cpus:g} CPU, {workers.gpus:g} GPU do not fit now: asks the cluster's autoscaler")
    if not isinstance(workers, TrainWorkers):
        wanted = {kind: each for kind, each in (("CPU", workers.cpus), ("GPU", workers.gpus)) if each}
        wait_for_room(wanted, stage)


def _what_is_missing(field: str, workers: Workers | TrainWorkers, count: int) -> str | None:
    have, number = ray.cluster_resources(), "serve.replicas" if field == "serve.workers" else f"{field}.count"
    for kind, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        if each * count > have.get(kind, 0.0):
            return (f"{field}: {count} x {each} {kind} are asked for, the cluster has {have.get(kind, 0.0):g}: lower {number} or "
                    f"{field}.{kind.lower()}s")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if (room := sum(workers_on(node, workers, count) for node in nodes)) < count:
        return (f"{field}: {count} x ({workers.cpus:g} CPU, {workers.gpus:g} GPU) are asked for, the {len(nodes)} nodes of the "
                f"cluster have room for {room}: lower {number}, {field}.cpus or {field}.gpus")
    return None


def workers_on(node: Mapping[str, float], workers: Reserved, most: int) -> int:
    """How many of `workers` fit on a node with these resources, at most `most`."""
    return min(most, fits(node, {"CPU": workers.cpus, "GPU": workers.gpus}))


def measuring_resources(config: RunConfig) -> dict[str, Any]:
    """Ray options of a task that times decoding: a GPU if the base runs on one, else a share of a CPU.

    With `base.device=auto` an autoscaler is asked for a GPU, so that nothing is measured on a CPU while GPUs are away.
    """
    wants_gpu = config.base.device == "cuda" or (config.base.device == "auto" and (
        ray.cluster_resources().get("GPU", 0) >= 1 or comes_when_asked({"CPU": 0.5, "GPU": 1}, "base.device=auto")))
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
