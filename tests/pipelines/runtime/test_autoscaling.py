"""Clusters that may grow are asked. What Ray's two autoscalers report is written out here as they report it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from hydra_core.errors import InputError
from pipelines.config import TrainWorkers, Workers, load_config
from pipelines.runtime import autoscaling, ray_cluster
from pipelines.runtime.autoscaling import comes_when_asked, may_grow

READONLY = {"active_nodes": {"node_ab": 1}, "idle_nodes": {"node_cd": 1}, "pending_nodes": [], "pending_launches": {}}
REAL = {"active_nodes": {"head": 1}, "idle_nodes": None, "pending_nodes": [], "pending_launches": {}}
BEGINS = REAL | {"pending_launches": {"gpu": 1}}
FAILS = REAL | {"node_availability_summary": {"node_availabilities": {"gpu": {"is_available": False}}}}
STARTS = REAL | {"pending_nodes": [["10.0.0.7", "gpu", "setting-up"]]}


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the autoscaler says, one after the other, and the last thing again and again; a second passes between."""
    said: list[Any] = []
    clock = [0.0]

    def report(key: object) -> bytes | None:
        found = said.pop(0) if len(said) > 1 else said[0]
        return None if found is None else json.dumps({"autoscaler_report": found}).encode()

    def passes(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(autoscaling, "is_autoscaler_v2", lambda: False)
    monkeypatch.setattr(autoscaling, "_internal_kv_get", report)
    monkeypatch.setattr(autoscaling.ray, "nodes", lambda: [{"NodeID": "ab"}, {"NodeID": "cd"}])
    monkeypatch.setattr(autoscaling.ray, "available_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(autoscaling, "time", SimpleNamespace(monotonic=lambda: clock[0], passes=passes))
    return said


class Group:
    """A placement group that is ready after so many seconds; never for None."""

    def __init__(self, ready: int | None) -> None:
        self.left, self.removed = ready, False

    def wait(self, seconds: float) -> bool:
        autoscaling.time.passes(seconds)  # type: ignore[attr-defined]
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize(("report", "grows"), [(None, False), (READONLY, False), (REAL, True), (BEGINS, True), (STARTS, True)])
def test_an_autoscaler_is_known_by_the_types_of_its_nodes(reports: list[Any], report: Any, grows: bool) -> None:
    """Without node types of its own, as in every other cluster, it names a node by its id."""
    reports.append(report)
    assert may_grow() == grows


def test_the_second_autoscaler_is_known_in_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.autoscaler.v2.sdk as sdk

    def status(*types: str, coming: tuple[str, ...] = ()) -> SimpleNamespace:
        return SimpleNamespace(active_nodes=[SimpleNamespace(ray_node_type_name=one) for one in types], idle_nodes=[],
                               pending_nodes=[], failed_launches=[],
                               pending_launches=[SimpleNamespace(ray_node_type_name=one) for one in coming])

    monkeypatch.setattr(autoscaling, "is_autoscaler_v2", lambda: True)
    monkeypatch.setattr(autoscaling.ray, "nodes", lambda: [{"NodeID": "ab"}])
    monkeypatch.setattr(autoscaling.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="h:6379"))
    for found, grows in ((status("node_ab"), False), (status("head"), True), (status("node_ab", coming=("gpu",)), True)):
        monkeypatch.setattr(sdk, "get_cluster_status", lambda address, found=found: found)
        assert may_grow() == grows


def ask(monkeypatch: pytest.MonkeyPatch, group: Group) -> bool:
    monkeypatch.setattr(autoscaling, "placement_group", lambda bundles: group)
    monkeypatch.setattr(autoscaling, "remove_placement_group", lambda given: setattr(given, "removed", True))
    found = comes_when_asked({"CPU": 0.5, "GPU": 1}, "base")
    assert group.removed
    return found


def test_a_node_that_comes_is_waited_for(reports: list[Any], monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """Two minutes and a half, with a line a minute."""
    reports += [REAL] * 10 + [BEGINS] * 30 + [FAILS] * 40 + [STARTS]
    assert ask(monkeypatch, Group(150))
    assert capsys.readouterr().err.splitlines() == [
        "base: there is no node with 0.5 CPU, 1 GPU now: asks the cluster's autoscaler for one",
        "base: waits for 0.5 CPU, 1 GPU on one node, 60 s until now: 2 CPU, 0 GPU are free in the cluster",
        "base: waits for 0.5 CPU, 1 GPU on one node, 120 s until now: 2 CPU, 0 GPU are free in the cluster"]


def test_a_cluster_that_starts_no_such_node_is_waited_for_half_a_minute(reports: list[Any], monkeypatch: pytest.MonkeyPatch,
                                                                        capsys: pytest.CaptureFixture[str]) -> None:
    reports.append(REAL)
    assert not ask(monkeypatch, Group(None))
    assert capsys.readouterr().err.splitlines()[1:] == ["base: the autoscaler starts no node with 0.5 CPU, 1 GPU"]


def test_a_cluster_without_an_autoscaler_is_not_asked(reports: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reports.append(READONLY)
    monkeypatch.setattr(autoscaling, "placement_group", None)
    assert not comes_when_asked({"GPU": 1}, "base")


@pytest.mark.parametrize(("device", "now", "comes", "gpus"), [
    ("auto", 0, False, 0), ("auto", 0, True, 1), ("auto", 2, False, 1), ("cpu", 2, True, 0), ("cuda", 0, False, 1)])
def test_what_is_measured_waits_for_a_gpu_that_may_come(monkeypatch: pytest.MonkeyPatch, device: str, now: int, comes: bool,
                                                        gpus: int) -> None:
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 2, "GPU": now})
    monkeypatch.setattr(ray_cluster, "comes_when_asked", lambda resources, stage: comes)
    monkeypatch.setattr(ray_cluster, "environment_options", lambda config: {})
    found = ray_cluster.measuring_resources(load_config(None, {"storage": "/s", "base.device": device}))
    assert (found["num_cpus"], found["num_gpus"]) == (0.5, gpus)


@pytest.mark.parametrize(("workers", "waits"), [(Workers(count=2, gpus=1), 1), (TrainWorkers(count=(2, 8), gpus=1), 0)])
def test_workers_for_which_a_cluster_may_grow_are_not_refused(monkeypatch: pytest.MonkeyPatch, workers: Any, waits: int,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """A pool waits for its first actor; training says itself what it waits for."""
    waited: list[Any] = []
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(ray_cluster, "may_grow", lambda: True)
    monkeypatch.setattr(ray_cluster, "wait_for_room", lambda *given: waited.append(given))
    ray_cluster.check_workers("x.workers", workers)
    assert capsys.readouterr().err == "x: 2 workers of 0.5 CPU, 1 GPU do not fit now: asks the cluster's autoscaler\n"
    assert waited == [({"CPU": 0.5, "GPU": 1}, "x")] * waits
    monkeypatch.setattr(ray_cluster, "may_grow", lambda: False)
    with pytest.raises(InputError, match=r"x\.workers: 2 x 1(\.0)? GPU are asked for, the cluster has 0: lower"):
        ray_cluster.check_workers("x.workers", workers)


def test_a_pool_that_finds_no_room_says_so_each_minute(reports: list[Any], monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    """Without an autoscaler too: others use the cluster. It never gives up."""
    reports.append(READONLY)
    asked, group = [], Group(200)
    monkeypatch.setattr(autoscaling, "placement_group", lambda bundles: asked.append(bundles) or group)
    monkeypatch.setattr(autoscaling, "remove_placement_group", lambda given: setattr(given, "removed", True))
    free = {"a": {"CPU": 0.2}, "b": {"CPU": 0.4, "GPU": 1.0}}
    monkeypatch.setattr(autoscaling, "state", SimpleNamespace(available_resources_per_node=lambda: free))
    autoscaling.wait_for_room({"CPU": 0.4}, "distill")
    assert not asked, "there is room on b"
    autoscaling.wait_for_room({"CPU": 0.5}, "distill")
    assert asked == [[{"CPU": 0.5}]] and group.removed
    said = "distill: waits for 0.5 CPU on one node, {} s until now: 2 CPU are free in the cluster"
    assert capsys.readouterr().err.splitlines() == [said.format(passed) for passed in (60, 120, 180)]
