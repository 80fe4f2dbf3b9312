"""Ray Train as the project uses it: beside another Ray, across nodes, and on a disk that fills."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import ray
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api import data_parallel_trainer

from hydra_core.base import Base
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads.checkpoint import load_checkpoint
from pipelines.config import load_config
from pipelines.runtime.artifacts import RunPaths
from pipelines.train import ray_train
from pipelines.train.ray_train import INTERFACE_VARIABLES, HeadTrainer, WaitingLines, choose_interface, interface_of
from tests.conftest import ROOT
from tests.pipelines.runtime.test_ray_access import START
from tests.pipelines.synthetic import write_distilled

Address = namedtuple("Address", "family address")
INTERFACES = {"lo": [Address(2, "127.0.0.1"), Address(10, "::1")], "docker0": [Address(2, "172.17.0.1")],
              "eth0": [Address(17, "aa:bb"), Address(2, "10.0.0.7"), Address(10, "fe80::1%eth0")]}


@pytest.mark.parametrize(("address", "name"), [("10.0.0.7", "eth0"), ("127.0.0.1", "lo"), ("172.17.0.1", "docker0"),
                                               ("fe80::1", "eth0"), ("10.0.0.8", None), ("aa:bb", None)])
def test_the_interface_with_the_nodes_address(address: str, name: str | None) -> None:
    assert interface_of(address, INTERFACES) == name


def test_a_worker_is_told_its_nodes_interface_unless_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_train, "psutil", SimpleNamespace(net_if_addrs=lambda: INTERFACES))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    for variable in INTERFACE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    choose_interface()
    assert {name: os.environ.pop(name) for name in INTERFACE_VARIABLES} == {
        "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib0", "TP_SOCKET_IFNAME": "eth0"}


class Failures(ray.train.TrainingFailedError):
    def __init__(self, failure: Exception) -> None:
        super().__init__("")
        self.worker_failures = {0: failure}


@pytest.mark.parametrize("error", [StoppedError("the disk is full"), InputError("row 3")])
def test_work_that_stopped_is_not_restarted(error: Exception) -> None:
    policy = ray_train.RestartPolicy(ray.train.FailureConfig(max_failures=2))
    assert policy.make_decision(Failures(error)) == FailureDecision.RAISE


def test_dead_workers_are_restarted() -> None:
    policy = ray_train.RestartPolicy(ray.train.FailureConfig(max_failures=1))
    failed = ray.train.WorkerGroupError("a worker died", {0: ray.exceptions.RayActorError()})
    assert [policy.make_decision(failed) for _ in range(2)] == [FailureDecision.RETRY, FailureDecision.RAISE]


def test_workers_that_find_no_room_are_told_of_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                          caplog: pytest.LogCaptureFixture) -> None:
    """Ray's controller logs a traceback for each attempt; what else it logs stays."""
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.5, "memory": 9.0})
    logger = logging.getLogger("waiting")
    monkeypatch.setattr(ray_train.ray_controller, "logger", logger)
    scaling = ray.train.ScalingConfig(num_workers=3, use_gpu=True, resources_per_worker={"CPU": 2, "GPU": 1})
    WaitingLines().after_controller_start(SimpleNamespace(scaling_config=scaling))
    for error in (WorkerGroupStartupTimeoutError(3), WorkerGroupStartupTimeoutError(3), ValueError("other")):
        try:
            raise error
        except (WorkerGroupStartupTimeoutError, ValueError) as caught:
            logger.exception("Error in control loop iteration: %s", caught)
    assert capsys.readouterr().err.splitlines() == ["train: waits for 3 workers of 2 CPU, 1 GPU: 1.5 CPU, 0 GPU are free in the "
                                                    "cluster (a worker takes all from one node)"] * 2
    assert [record.getMessage() for record in caplog.records] == ["Error in control loop iteration: other"]
    assert any(isinstance(one, WaitingLines) for one in HeadTrainer(lambda: None)._create_default_callbacks())


def test_no_cleaner_of_placement_groups(local_ray: None) -> None:
    names = {type(one).__name__ for one in HeadTrainer(lambda: None)._create_default_callbacks()}
    assert "BackendSetupCallback" in names and ray_train.CLEANER not in names


def test_an_interrupt_stays_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's handler would end a training with exit code 0 and stay after it."""
    monkeypatch.setattr(data_parallel_trainer, "ray", MagicMock())
    before = signal.getsignal(signal.SIGINT)
    try:
        HeadTrainer(lambda: None)._initialize_and_run_controller()
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, before)


def write_run(tiny_base: Base, tiny_base_dir: Path, storage: Path, **changes: object) -> list[str]:
    """A distilled run below `storage`; the words that train it."""
    values = {"storage": str(storage), "base.model": str(tiny_base_dir), "base.dtype": "fp32", "train.only": "hydra",
              "train.max_steps": 4, "train.rows_per_step": 4, "train.validate_every": 2, "train.validation_rows": 4, **changes}
    write_distilled(load_config(None, values), tiny_base, train=16, held_out=4)
    return [sys.executable, "-m", "jobs.train", *(f"{name}={value}" for name, value in values.items())]


def environment_of(worker_env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")} | worker_env


@pytest.mark.slow
def test_beside_another_ray(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path, worker_env: dict[str, str]) -> None:
    """In a folder whose name is as people name folders."""
    storage = tmp_path / "mes données #1 100%"
    command, environment = write_run(tiny_base, tiny_base_dir, storage), environment_of(worker_env)
    other = subprocess.Popen([sys.executable, "-c", START], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    finally:
        other.communicate(timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "PlacementGroupCleaner" not in done.stderr
    outputs = json.loads(done.stdout)["outputs"]
    assert outputs["hydra"] == str(storage / "runs" / "default" / "train" / "hydra" / "heads")
    assert load_checkpoint(Path(outputs["hydra"]), tiny_base.vocabulary).drafter.num_heads == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_is_one_line_and_the_same_command_goes_on(tiny_base: Base, tiny_base_dir: Path, small_disk: Path,
                                                                    tmp_path: Path, worker_env: dict[str, str]) -> None:
    storage = small_disk / "storage"
    command, environment = write_run(tiny_base, tiny_base_dir, storage), environment_of(worker_env)
    config = load_config(None, dict(word.split("=", 1) for word in command[3:]))
    subprocess.run([sys.executable, "-c", "import sys; from pipelines.config import load_config; from pipelines.tracking import "
                    "Tracker; Tracker.open(load_config(None, {'storage': sys.argv[1]})).parent()", str(storage)],
                   cwd=ROOT, env=environment, check=True)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(b"0" * max(0, shutil.disk_usage(small_disk).free - (200 << 10)))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and re.search(rf"the disk is full: {small_disk}\S* has 0\.\d MiB left", told[0]), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 25, done.stderr
    assert not (RunPaths.of(config).stage("train", "hydra") / "heads").exists()
    filler.unlink()
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr
    assert load_checkpoint(Path(json.loads(again.stdout)["outputs"]["hydra"]), tiny_base.vocabulary).drafter.num_heads == 4
