"""A training whose number of workers changes: by a signal, a stopped driver, nodes that die, are drained or come."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2.api.config import ScalingConfig

from hydra_core.base import Base
from pipelines.config import RunConfig, to_yaml
from pipelines.runtime.artifacts import RunPaths
from pipelines.train import elastic, notice
from pipelines.train.context import LOGGED
from pipelines.train.elastic import FreeRoomPolicy, waiting_line
from pipelines.train.notice import Notice
from pipelines.train.stage import _earlier_fingerprints, _fingerprint, run_train
from tests.conftest import ROOT
from tests.pipelines.synthetic import write_distilled
from tests.pipelines.train.test_stage import (
    changed,
    children_of,
    curve_of,
    make_config,
    saved_steps,
    wait_for,
    weights_of,
    without_time,
)


def environment_of(worker_env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | worker_env


def losses(curve: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in curve]


def shifts(curve: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(number of workers, steps that so many did), one after the other."""
    return [(workers, len(list(records))) for workers, records in groupby(curve, key=lambda record: record["workers"])]


STEPS, EVERY = 160, 80


@pytest.fixture(scope="module")
def calm(tiny_base: Base, tiny_base_dir: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished, undisturbed run of two workers."""
    config = make_config(tiny_base_dir, tmp_path_factory.mktemp("calm") / "storage", "calm",
                         **{"train.max_steps": STEPS, "train.validate_every": EVERY})
    write_distilled(config, tiny_base)
    run_train(config)
    return config


@pytest.mark.slow
def test_a_worker_that_is_told_to_leave_loses_no_step(calm: RunConfig, tiny_base: Base, tmp_path: Path,
                                                      moment: random.Random) -> None:
    """SIGTERM to one of two, between two checkpoints; and it is no failure, none of which is allowed."""
    config = changed(calm, storage=str(tmp_path / "storage"), train__max_failures=0)
    write_distilled(config, tiny_base)
    logged = RunPaths.of(config).stage("train", "hydra") / LOGGED
    asked: list[float] = []

    def ask() -> None:
        wait_for(lambda: logged.exists() and f'"next_step": {EVERY}' in logged.read_text())
        time.sleep(moment.uniform(0.1, 0.4))
        workers = [pid for pid, command in children_of(os.getpid()).items() if "RayTrainWorker" in command]
        asked.append(time.time())
        os.kill(moment.choice(workers), signal.SIGTERM)

    asker = threading.Thread(target=ask)
    asker.start()
    run_train(config)
    asker.join()
    curve = curve_of(config, "hydra")
    assert without_time(curve) == without_time(curve_of(calm, "hydra"))
    assert weights_of(config, "hydra") == weights_of(calm, "hydra")
    stop = max(range(1, len(curve)), key=lambda step: curve[step]["time"] - curve[step - 1]["time"])
    assert stop > EVERY and curve[stop]["time"] > asked[0] + 1, "the workers were not ended between two checkpoints"


@pytest.mark.slow
def test_a_stopped_driver_leaves_a_checkpoint_and_another_number_goes_on(
        calm: RunConfig, tiny_base: Base, tmp_path: Path, worker_env: dict[str, str]) -> None:
    """SIGTERM, as `ray job stop` and Kubernetes send it. Two workers begin, three end, of whom one has fewer rows."""
    config = changed(calm, storage=str(tmp_path / "storage"))
    write_distilled(config, tiny_base)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    job = subprocess.Popen([sys.executable, "-m", "jobs.train", "--config", str(tmp_path / "config.yaml")], cwd=ROOT, text=True,
                           env=environment_of(worker_env), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: saved_steps(config, "hydra") >= EVERY or job.poll() is not None)
    job.send_signal(signal.SIGTERM)
    _, told = job.communicate(timeout=100)
    assert job.returncode and "Traceback" not in told, told
    assert "train: interrupted: the running step ends with a checkpoint" in told
    left = re.search(rf"step (\d+)/{STEPS}, a worker must leave", told)
    assert left and saved_steps(config, "hydra") == int(left[1]) >= EVERY, told
    run_train(changed(config, train__workers={"count": 3, "cpus": 0.5, "threads": 1}))
    curve = curve_of(config, "hydra")
    assert [record["step"] for record in curve] == list(range(STEPS))
    assert shifts(curve) == [(2, int(left[1])), (3, STEPS - int(left[1]))]
    assert losses(curve) == pytest.approx(losses(curve_of(calm, "hydra")), rel=1e-3)


ELASTIC = """
import json, os, sys, threading
import ray
from ray.cluster_utils import Cluster
from pipelines.config import load_config
from pipelines.runtime.artifacts import RunPaths
from pipelines.train import run_train, stage
from tests.pipelines.train.test_stage import wait_for

stage.RESIZE_SECONDS = 1.0
config = load_config(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
os.environ |= {"RAY_ADDRESS": cluster.address, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8"}
stays, dies = (cluster.add_node(num_cpus=1) for _ in range(2))
ray.init(address=cluster.address, logging_level="warning")

def workers():
    # of the newest checkpoint
    found = [(0, 0)]
    for path in (RunPaths.of(config).stage("train", "hydra") / "state").glob("*/*/position.json"):
        try:
            one = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        found.append((one["next_step"], one["workers"]))
    return max(found)[1]

def change():
    wait_for(lambda: workers() == 2)
    cluster.remove_node(dies, allow_graceful=False)
    wait_for(lambda: workers() == 1)
    cluster.add_node(num_cpus=1)
    wait_for(lambda: workers() == 2)

trainer = threading.Thread(target=lambda: print(run_train(config).to_json(), flush=True), daemon=True)
trainer.start()
change()  # in the main thread, where alone Ray adds nodes
trainer.join()
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif("HYDRA_TEST_ALL" not in os.environ, reason="takes minutes: HYDRA_TEST_ALL=1 runs it")
def test_training_goes_on_when_nodes_go_and_come(calm: RunConfig, tiny_base: Base, tmp_path: Path,
                                                 worker_env: dict[str, str]) -> None:
    """Two nodes, one of which dies; a third one comes."""
    config = changed(calm, storage=str(tmp_path / "storage"), train__validate_every=2, train__validation_rows=2,
                     train__workers={"count": [1, 2], "cpus": 1, "threads": 1})
    write_distilled(config, tiny_base)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    done = subprocess.run([sys.executable, "-c", ELASTIC, str(tmp_path / "config.yaml")], cwd=ROOT, text=True, timeout=400,
                          capture_output=True, env=environment_of(worker_env))
    assert done.returncode == 0, done.stderr
    curve = curve_of(config, "hydra")
    assert [record["step"] for record in curve] == list(range(STEPS))
    (first, before), (second, alone), (third, grown) = shifts(curve)
    assert (first, second, third) == (2, 1, 2) and grown, done.stderr
    assert before % 2 == 0, "the dead node's steps since the last checkpoint are done again"
    (resized,) = re.findall(rf"step (\d+)/{STEPS}, the number of workers changes", done.stderr)
    assert int(resized) == before + alone
    assert losses(curve) == pytest.approx(losses(curve_of(calm, "hydra")), rel=1e-3)
    assert "Traceback" not in done.stderr


def test_the_number_of_workers_is_no_other_training(tiny_base_dir: Path, storage: Path) -> None:
    """Nor was it for an earlier version whose number is asked for, or recorded in the folder that it began."""
    config = make_config(tiny_base_dir, storage, "number", **{"train.workers.count": 3})
    more = changed(config, train__workers={"count": [1, 2]})
    assert _fingerprint(config, "hydra", "data") == _fingerprint(more, "hydra", "data")
    folder = storage / "runs" / "number" / "train" / "hydra"
    folder.mkdir(parents=True)
    own = _earlier_fingerprints(config, "hydra", "data")
    (folder / "claim.json").write_text(json.dumps({"settings": {"train": {"workers": {"count": 7}}}}))
    both = _earlier_fingerprints(config, "hydra", "data")
    assert own < both
    assert both - own == _earlier_fingerprints(changed(config, train__workers={"count": 7}), "hydra", "data")


class Cluster:
    """What the policy sees of a cluster, and what the workers are told."""

    def __init__(self, policy: FreeRoomPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free: dict[str, dict[str, float]] = {}
        self.draining: dict[str, int] = {}
        self.policy, self.now, self.asked, self.told = policy, 1000.0, 0, list[Any]()
        monkeypatch.setattr(elastic, "state", SimpleNamespace(
            available_resources_per_node=lambda: self.free, get_draining_nodes=lambda: self.draining))
        monkeypatch.setattr(elastic, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(ElasticScalingPolicy, "_maybe_send_resource_request", self._ask)

    def _ask(self) -> None:
        self.asked += 1

    def start(self) -> int | None:
        """The number of workers that are started, None while the policy waits."""
        decision = self.policy.make_decision_for_non_running_worker_group()
        return decision.num_workers if isinstance(decision, ResizeDecision) else None

    def watch(self, nodes: list[str]) -> list[Any]:
        """What the workers on `nodes` are told, which train."""
        self.told = []
        group: Any = SimpleNamespace(workers=[SimpleNamespace(
            metadata=SimpleNamespace(node_id=node), execute_async=lambda call, given: self.told.append((call, given)))
            for node in nodes])
        assert isinstance(self.policy.make_decision_for_running_worker_group(group, None), NoopDecision)
        return self.told


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """For two to five workers of half a CPU and a GPU."""
    scaling = ScalingConfig(num_workers=(2, 5), use_gpu=True, resources_per_worker={"CPU": 0.5, "GPU": 1})
    return Cluster(FreeRoomPolicy(scaling), monkeypatch)


def test_it_starts_with_what_there_is(room: Cluster) -> None:
    room.free = {"a": {"CPU": 1.9, "GPU": 4.0}, "b": {"CPU": 8.0}}
    assert room.start() is None and room.asked == 1, "what is missing may come at once"
    room.now += elastic.RELEASE_SECONDS
    assert room.start() == 3
    room.free = {"a": {"CPU": 1.0, "GPU": 4.0}, "b": {"CPU": 8.0, "GPU": 8.0}}
    assert room.start() == 5, "no more than are asked for"


def test_with_too_little_room_it_asks_for_the_fewest(room: Cluster) -> None:
    assert room.start() is None
    room.now += elastic.RELEASE_SECONDS
    assert room.start() == 2


def test_it_goes_on_when_a_node_goes_and_holds_the_room_of_the_last_group(room: Cluster) -> None:
    room.free = {"a": {"CPU": 0.0}, "b": {"CPU": 0.2, "GPU": 1.0}}
    assert room.watch(["a", "a", "b", "c"]) == [] and room.start() is None
    room.now += elastic.RELEASE_SECONDS
    assert room.start() == 3, "two on a, one on b; node c is gone"
    room.free["a"] = {"CPU": 1.0, "GPU": 2.0}
    room.watch(["a", "a"])
    room.draining = {"b": 0}
    room.now += 2 * elastic.RELEASE_SECONDS
    assert room.start() is None
    room.now += elastic.RELEASE_SECONDS
    assert room.start() == 4, "nothing on a node that is drained"


def test_it_looks_for_more_room_each_minute(room: Cluster) -> None:
    room.free = {"a": {"CPU": 0.0}, "b": {"CPU": 0.1, "GPU": 4.0}}
    told = [(notice.give, Notice.RESIZE)] * 2
    assert room.watch(["a", "a"]) == [], "no room"
    room.free["b"] = {"CPU": 1.0, "GPU": 1.0}
    assert room.watch(["a", "a"]) == [], "a minute has not passed"
    room.now += 60
    assert room.watch(["a", "a"]) == told
    room.now += 60
    assert room.watch(["a"] * 5) == [], "as many as are asked for"


def test_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic.ray, "available_resources", lambda: {"CPU": 1.5})
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 2})
    assert waiting_line(scaling) == ("waits for 1 to 4 workers of 2 CPU: 1.5 CPU are free in the cluster (a worker takes all "
                                     "from one node)")


def test_the_first_signal_is_a_notice_and_the_second_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "_given", Notice.NONE)
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        notice.listen()
        notice.give(Notice.RESIZE)
        signal.raise_signal(signal.SIGTERM)
        assert notice._given is Notice.LEAVE and not got
        notice.give(Notice.RESIZE)
        assert notice._given is Notice.LEAVE, "the more urgent one stays"
        signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
