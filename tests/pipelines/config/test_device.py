"""Which device `auto` is: no process takes a GPU that it has not reserved."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import ray
import torch

from hydra_core import base as hydra_base
from pipelines.config import BaseSection
from pipelines.config import base as base_section
from pipelines.config.base import reserved_device
from tests.conftest import ROOT


def fake_ray(gpus: list[str], connected: bool = True) -> SimpleNamespace:
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": gpus, "TPU": []})
    return SimpleNamespace(is_initialized=lambda: connected, get_runtime_context=lambda: context)


@pytest.mark.parametrize(("process", "device", "wanted"), [
    (fake_ray([]), "auto", "cpu"), (fake_ray(["0"]), "auto", "auto"), (fake_ray(["1"]), "cpu", "cpu"),
    (fake_ray([]), "cuda", "cuda"),  # what the user has named
    (fake_ray([], connected=False), "auto", "auto"), (None, "auto", "auto")])
def test_a_worker_takes_the_gpu_that_it_has_reserved(monkeypatch: pytest.MonkeyPatch, process: SimpleNamespace | None,
                                                     device: str, wanted: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", process)  # type: ignore[arg-type]
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert reserved_device(device) == wanted


@pytest.mark.parametrize(("visible", "wanted"), [(None, "cpu"), ("", "cpu"), ("2", "auto")])
def test_the_driver_of_a_submitted_job_has_what_its_entrypoint_reserves(monkeypatch: pytest.MonkeyPatch, visible: str | None,
                                                                        wanted: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert reserved_device("auto") == wanted


def test_a_base_is_loaded_where_there_is_a_reservation(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On a machine with a GPU, in a worker that has reserved none: on the CPU, with a line; elsewhere as it is asked for."""
    loaded = []
    monkeypatch.setattr(hydra_base, "load_base", lambda model, **wanted: loaded.append(wanted["device"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "ray", fake_ray([]))  # type: ignore[arg-type]
    BaseSection().load("/cache")
    assert caplog.messages == ["the base runs on a CPU: this worker reserves none of the GPUs here (workers.gpus)"]
    BaseSection().load("/cache", device="cuda:1")
    BaseSection(device="cuda").load("/cache")
    monkeypatch.setitem(sys.modules, "ray", fake_ray(["0"]))  # type: ignore[arg-type]
    BaseSection().load("/cache")
    assert loaded == ["cpu", "cuda:1", "cuda", "auto"] and len(caplog.messages) == 1


def test_nothing_goes_round_that_rule() -> None:
    """A base is loaded by its section alone, and no other part of a pipeline names a device that it was not given, but a plan,
    which asks a GPU how much of it is free, and the record of a machine, which lists its GPUs."""
    home = ROOT / "pipelines"
    calls = re.compile(r"\bload_base\(|device_count\(|\.cuda\(\)|[\"']cuda:\d|torch\.device\([\"']cuda")
    found = {str(path.relative_to(home)) for path in home.rglob("*.py") if calls.search(path.read_text(encoding="utf-8"))}
    assert found == {"config/base.py", "runtime/hardware.py", "sizing/hardware.py"}
    assert base_section.__file__ == str(home / "config" / "base.py")


def test_a_task_of_ray_has_reserved_none(local_ray: None) -> None:
    task = ray.remote(num_cpus=0.1)(lambda: (reserved_device("auto"), reserved_device("cuda")))
    assert ray.get(task.remote()) == ("cpu", "cuda") and reserved_device("auto") == "cpu"
