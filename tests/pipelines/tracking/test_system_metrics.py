"""The load of the machine in a run, by MLflow's own monitors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

from pipelines.config import RunConfig, load_config
from pipelines.tracking import Tracker, system_metrics, worker_system_metrics
from tests.processes import until

CPU = "system/cpu_utilization_percentage"


@pytest.fixture
def config(storage: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    return load_config(None, {"storage": str(storage)})


def steps(uri: str, run_id: str) -> list[int]:
    return [point.step for point in MlflowClient(uri).get_metric_history(run_id, CPU)]


def test_the_driver_s_machine_and_then_a_worker_s(config: RunConfig) -> None:
    tracker = Tracker.open(config)
    run = tracker.start("distill")
    with system_metrics(config, run, tracker.uri):
        until(lambda: len(steps(tracker.uri, run.run_id)) >= 2)
    done = steps(tracker.uri, run.run_id)
    time.sleep(0.5)
    assert steps(tracker.uri, run.run_id) == done == list(range(len(done)))  # it ends with the work
    metrics = MlflowClient(tracker.uri).get_run(run.run_id).data.metrics
    assert {"system/system_memory_usage_percentage", "system/disk_usage_percentage"} <= metrics.keys()
    with worker_system_metrics(config, tracker.uri, run.run_id):  # a resumed run's steps go on
        until(lambda: len(steps(tracker.uri, run.run_id)) > len(done))
    assert steps(tracker.uri, run.run_id) == list(range(len(steps(tracker.uri, run.run_id))))


def test_samples_wait_for_a_store_that_is_away(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Tracker.open(config)
    run = tracker.start("distill")
    log, asked = run.log_curve, list[int]()

    def away(points: Any, times: Any) -> None:
        asked.append(len(points))
        if len(asked) < 4:
            raise ConnectionError("away")
        log(points, times)

    monkeypatch.setattr(run, "log_curve", away)
    with system_metrics(config, run, tracker.uri):
        until(lambda: len(asked) >= 5)
    assert asked[:5] == [1, 2, 3, 4, 1]
    assert steps(tracker.uri, run.run_id) == list(range(len(asked)))


def test_nothing_is_logged_where_it_is_not_asked_for_or_cannot_be(config: RunConfig, monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker.open(config)
    run = tracker.start("distill")
    off = load_config(None, {"storage": config.storage, "tracking.system_metrics": False})
    with system_metrics(off, run, tracker.uri), worker_system_metrics(config, None, None):
        time.sleep(0.5)

    def fail(*_: Any) -> None:
        raise OSError("no such device\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(CPUMonitor, "collect_metrics", fail)
        with system_metrics(config, run, tracker.uri):
            time.sleep(0.5)
        assert capsys.readouterr().err == "tracking: the machine's load is not logged (no such device)\n"
        patch.setattr(CPUMonitor, "__init__", fail)
        with system_metrics(config, run, tracker.uri):
            pass
        assert capsys.readouterr().err == "tracking: the machine's load is not logged (no such device)\n"
    assert steps(tracker.uri, run.run_id) == []
