"""The dashboard shows what is told, and all of it."""

from __future__ import annotations

import json
import queue
import re

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine
from pipelines.serve import engine_loop as host
from pipelines.serve import metrics
from pipelines.serve.messages import Answer
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


class Told:
    """Stands in for Ray's metrics: what each series was told, by name and tags."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = {}

    def kind(self, tell: str) -> type:
        told = self

        class Metric:
            def __init__(self, name: str, description: str, boundaries: list[float] | None = None,
                         tag_keys: tuple[str, ...] = ()) -> None:
                assert description and boundaries == (sorted(boundaries) if boundaries else None)
                self.name, self.tag_keys = name, tag_keys

            def _tell(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
                assert set(tags or ()) == set(self.tag_keys) and (tell != "inc" or value > 0)  # as Ray's counters refuse 0
                told.values.setdefault((self.name, *(tags or {}).values()), []).append(value)

        setattr(Metric, tell, Metric._tell)
        return Metric


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()
    for name, tell in (("Counter", "inc"), ("Gauge", "set"), ("Histogram", "observe")):
        monkeypatch.setattr(metrics, name, told.kind(tell))
    return told


def test_what_an_answer_adds(told: Told) -> None:
    """The figures of its usage, each in its own series."""
    replica = metrics.ReplicaMetrics()
    replica.answer(Answer("a", "text", (5, 6, 7, 8, 9, 4, 3), "stop", 11, 3, 10, 3, 0.5, accepted_lengths=(1, 1, 1),
                          cached_tokens=6))
    assert told.values == {
        ("hydra_answers", "stop"): [1], ("hydra_prompt_tokens",): [11], ("hydra_completion_tokens",): [7],
        ("hydra_cached_tokens",): [6], ("hydra_decoding_steps",): [3],
        ("hydra_drafted_tokens",): [10], ("hydra_accepted_tokens",): [3], ("hydra_tokens_per_step",): [2.0],
        ("hydra_steps_by_accepted_depth", "1"): [2], ("hydra_steps_by_accepted_depth", "2"): [1]}
    told.values.clear()
    replica.answer(Answer("b", "", (2,), "stop", 4, 0, None, 0, 0.1))  # no steps, no drafts
    assert told.values == {("hydra_answers", "stop"): [1], ("hydra_prompt_tokens",): [4], ("hydra_completion_tokens",): [1]}
    told.values.clear()
    replica.unfinished("cancelled", 5)
    replica.unfinished("timeout", 0)
    assert told.values == {("hydra_answers", "cancelled"): [1], ("hydra_completion_tokens",): [5],
                           ("hydra_answers", "timeout"): [1]}


def test_what_else_a_replica_tells(told: Told) -> None:
    clock = Clock()
    replica = metrics.ReplicaMetrics(clock)
    replica.serves(7)
    load = host.Load(running=5, waiting=3, kv_use=0.25)
    replica.load(load)
    assert told.values == {("hydra_queue_size",): [3], ("hydra_batch_size",): [5], ("hydra_kv_use",): [0.25],
                           ("hydra_heads_version",): [7]}
    told.values.clear()
    replica.serves(None)
    replica.load(load)
    assert not told.values  # a step takes milliseconds, and nobody reads them as often
    clock.now += metrics.LOAD_SECONDS
    replica.load(load)
    assert told.values["hydra_heads_version",] == [0]
    told.values.clear()
    replica.first_token(0.75)
    replica.step(0.5, 4)
    replica.step(0.5, 0)
    replica.failed(restarted=True)
    replica.failed(restarted=False)
    replica.rejected()
    front = metrics.FrontMetrics()
    front.request("/v1/completions", 429, 0.25)
    front.waiting(4)
    assert told.values == {("hydra_first_token_seconds",): [0.75], ("hydra_between_tokens_seconds",): [0.125, 0.5],
                           ("hydra_engine_failures",): [1.0, 1.0], ("hydra_engine_restarts",): [1.0],
                           ("hydra_heads_rejected",): [1.0],
                           ("hydra_requests", "/v1/completions", "429"): [1.0], ("hydra_queue_size",): [4],
                           ("hydra_request_seconds", "/v1/completions"): [0.25]}
