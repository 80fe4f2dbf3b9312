"""Joining and starting Ray, and workers that fit: what goes wrong is one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray

from hydra_core.errors import InputError, StoppedError
from pipelines.config import Workers, load_config
from pipelines.runtime import ray_cluster
from pipelines.runtime.ray_cluster import check_workers
from tests.conftest import ROOT


@pytest.mark.parametrize(("settings", "told"), [
    ({"ray_address": "127.0.0.1:6379"},
     r"^ray_address=127\.0\.0\.1:6379: cannot be joined \(Version mismatch: Ray: 2\.1 This: 2\.2\)"),
    ({}, r"^a local Ray cannot be started \(Version mismatch: .*\): its logs are below /tmp/r$")])
def test_a_ray_that_does_not_start_is_one_line(settings: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("Version mismatch:\n    Ray: 2.1\n    This: 2.2")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "ray", SimpleNamespace(is_initialized=lambda: False, init=fail, exceptions=ray.exceptions))
    for name in ("prepare_to_join", "quieten_driver"):
        monkeypatch.setattr(ray_cluster, name, lambda *_: None)
    monkeypatch.setattr(ray_cluster, "prepare_to_start", lambda: Path("/tmp/r"))
    with pytest.raises(StoppedError, match=told), ray_cluster.ensure_ray(load_config(None, settings)):
        pass


def test_workers_that_never_fit(local_ray: None) -> None:
    check_workers("x.workers", Workers(count=2, cpus=1))
    with pytest.raises(InputError, match=r"x\.workers: 3 x 1\.0 CPU are asked for, the cluster has 2: lower x\.workers\.count"):
        check_workers("x.workers", Workers(count=1, cpus=1), 3)
    with pytest.raises(InputError, match=r"x\.workers: 1 x 1\.0 GPU"):
        check_workers("x.workers", Workers(cpus=0, gpus=1))


WAITING = """
import sys, time
import pipelines.generate
from jobs.runner import run
from pipelines.runtime.ray_cluster import ensure_ray

def run_generate(config):
    with ensure_ray(config):
        print("connected", file=sys.stderr, flush=True)
        time.sleep(300)

pipelines.generate.run_generate = run_generate
sys.exit(run("generate", ["storage=" + sys.argv[1], "base.dtype=fp32", "Hello"]))
"""


def test_workers_are_counted_on_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four nodes of 3 CPUs have no room for five workers of 2, of which each is on one node, though they have 12 in all."""
    nodes = [{"Alive": True, "Resources": {"CPU": 3.0, "memory": 1e9}} for _ in range(3)]
    nodes += [{"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(ray_cluster.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_cluster.ray, "cluster_resources", lambda: {"CPU": 12.0, "GPU": 1.0})
    monkeypatch.setattr(ray_cluster, "may_grow", lambda: False)
    monkeypatch.setattr(ray_cluster, "wait_for_room", lambda wanted, stage: None)
    check_workers("x.workers", Workers(count=4, cpus=2))
    check_workers("x.workers", Workers(count=28, cpus=0.4))
    check_workers("x.workers", Workers(count=4, cpus=0.1, gpus=0.25))
    check_workers("x.workers", Workers(count=9, cpus=0))
    for workers, room in ((Workers(count=5, cpus=2), 4), (Workers(count=1, cpus=4), 0), (Workers(count=2, cpus=2, gpus=0.5), 1)):
        with pytest.raises(InputError, match=rf"the 4 nodes of the cluster have room for {room}: lower x\.workers\.count, "):
            check_workers("x.workers", workers)


@pytest.mark.slow
def test_a_terminated_stage_ends_like_an_interrupted_one(tmp_path: Path) -> None:
    """As `kill`, a container's stop and Kubernetes end it: one line, exit 1, and nothing of its Ray stays."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    stage = subprocess.Popen([sys.executable, "-c", WAITING, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                             env=environment)
    assert stage.stderr is not None
    assert any("connected" in line for line in stage.stderr)
    started = psutil.Process(stage.pid).children(recursive=True)
    stage.send_signal(signal.SIGTERM)
    told = stage.stderr.read().splitlines()
    assert stage.wait(60) == 1
    # the cluster's own messages are of the machine: little memory, a full disk
    assert [line for line in told if "(raylet)" not in line] == ["generate: interrupted; run the same command again to continue"]
    assert started and not psutil.wait_procs(started, timeout=30)[1]
