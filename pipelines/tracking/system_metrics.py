"""Load of the machine while a stage runs, as MLflow's page of a run shows it: processor, memory, disk, network, GPUs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.config import RunConfig
from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line
from pipelines.tracking.runs import Run, metric_logger

Log = Callable[[Sequence[tuple[int, Mapping[str, float]]], Sequence[float]], None]
"""As `Run.log_curve`."""
END_SECONDS = 10.0
"""Longest wait, at the end, for a sample that is being sent."""
MOST_WAITING = 1000
"""Samples that are kept while the store takes none; then the oldest are dropped."""


@contextmanager
def system_metrics(config: RunConfig, run: Run, uri: str) -> Iterator[None]:
    """Log the load of this machine in `run` inside the block, unless `tracking.system_metrics` is false. The work never fails for
    it."""
    with _sampled(config, uri, run.run_id, run.log_curve):
        yield


@contextmanager
def worker_system_metrics(config: RunConfig, uri: str | None, run_id: str | None) -> Iterator[None]:
    """The same in a worker, which has only the address and the id of the run, or neither."""
    if uri is None or run_id is None:
        yield
        return

    def log(points: Sequence[tuple[int, Mapping[str, float]]], times: Sequence[float]) -> None:
        metric_logger(uri, run_id).log_curve(points, times)

    with _sampled(config, uri, run_id, log):
        yield


@contextmanager
def _sampled(config: RunConfig, uri: str, run_id: str, log: Log) -> Iterator[None]:
    sampler = Sampler(uri, run_id, log) if config.tracking.system_metrics else None
    try:
        yield
    finally:
        if sampler is not None:
            sampler.finish()


class Sampler:
    """MLflow's own monitors, whose samples go through `log`: a store that is away keeps them waiting, where MLflow's own thread
    would end.

    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL (seconds, default 10) and MLFLOW_SYSTEM_METRICS_NODE_ID count as MLflow says. Names of
    metrics are MLflow's, and steps go on from those that the run has.
    """

    def __init__(self, uri: str, run_id: str, log: Log) -> None:
        self._uri, self._run_id, self._log = uri, run_id, log
        self._monitor: Any = None
        self._waiting: list[tuple[float, int, dict[str, float]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """End it. A sample that cannot be sent within seconds is dropped."""
        self._ended.set()
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        try:
            self._monitor = SystemMetricsMonitor(self._run_id, resume_logging=True, tracking_uri=self._uri)  # asks the store
            while not self._ended.is_set():
                self._monitor.collect_metrics()
                self._ended.wait(self._monitor.sampling_interval)
                self._take()
                self._send()
        except Exception as error:  # of a device that is gone, say: none is worth the work
            say("tracking", f"the machine's load is not logged ({first_line(error)[:200]})")

    def _take(self) -> None:
        monitor = self._monitor
        prefix = f"system/{monitor.node_id}/" if monitor.node_id else "system/"
        metrics = {f"{prefix}{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
        for one in monitor.monitors:
            one.clear_metrics()
        self._waiting = [*self._waiting, (time.time(), monitor._logging_step, metrics)][-MOST_WAITING:]
        monitor._logging_step += 1

    def _send(self) -> None:
        points = [(step, metrics) for _, step, metrics in self._waiting]
        try:
            self._log(points, [when for when, _, _ in self._waiting])
        except Exception:  # each kind of store raises its own exceptions; the next sample tries again
            return
        self._waiting = []
