"""The dashboard shows what is told, and all of it."""

from __future__ import annotations

import json
import queue
import re

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine
from pipelines.serve import engine_loop as host
from pipelines.serve.metrics import NAMES, series
from tests.conftest import ROOT


def test_every_metric_of_the_dashboard_exists_and_every_metric_is_on_it() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana_dashboard.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for text in asked for name in re.findall(r"ray_hydra_\w+", text)}
    assert named and named <= series()
    assert all(any(f"ray_{name}" in text for text in asked) for name in NAMES)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_an_idle_replica_goes_on_telling(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's exporter forgets a gauge that nobody sets."""
    monkeypatch.setattr(host, "REPORT_SECONDS", 0.01)
    told: queue.Queue[host.Load] = queue.Queue()
    running = host.EngineLoop(Engine(tiny_base), told.put)
    try:
        assert [told.get(timeout=10).running for _ in range(3)] == [0, 0, 0]
    finally:
        running.close()
