"""What work took."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.runtime import usage
from pipelines.runtime.usage import Meter, Usage, energy_between, read_energy, time_of_steps


def test_a_meter_counts_this_process() -> None:
    meter = Meter(processes=3)
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    found = meter.read()
    assert found.cpu_seconds is not None and found.cpu_seconds >= 0.05
    assert found.device_seconds >= 3 * 0.04 and found.gpu_seconds == 0
    with_gpus = Meter(processes=3, gpus=2).read()
    assert with_gpus.device_seconds == with_gpus.gpu_seconds


def test_commands_of_one_stage_are_summed(tmp_path: Path) -> None:
    assert Usage(2.0, 0.0, 1.0).added_to(tmp_path) == Usage(2.0, 0.0, 1.0)
    assert Usage(3.0, 1.0, 1.0, 0.5).added_to(tmp_path) == Usage(5.0, 1.0, 2.0)  # the first one's energy is not known
    assert Usage(1.23456789, kwh=0.0).figures() == {"device_seconds": 1.23457, "gpu_seconds": 0.0, "kwh": 0.0}
    (tmp_path / usage.FILE).write_text("{", encoding="utf-8")
    assert Usage(1.0).added_to(tmp_path) == Usage(1.0)


def test_a_training_by_its_curve() -> None:
    """Workers that came and went, and a night between two commands."""
    times = [(0.0, 2), (1.0, 2), (3.0, 4), (3.0 + 10 * usage.LONGEST_PAUSE, 4), (4.0 + 10 * usage.LONGEST_PAUSE, 4)]
    records = [{"time": when, "workers": workers} for when, workers in times]
    assert time_of_steps(records, 0) == Usage(1 * 2 + 2 * 4 + 1 * 4)
    assert time_of_steps(records, 0.5) == Usage(7.0, 7.0)
    assert time_of_steps([{"time": 1.0}, {"time": 2.0}], 0) == Usage(1.0)  # of an earlier version
    assert time_of_steps([], 1) == Usage(0.0)


def test_energy_of_processors_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("9000000\n", encoding="ascii")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n", encoding="ascii")
    monkeypatch.setattr(usage, "_POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5000))
    before = read_energy()
    assert {name: value for name, value in before.items() if "range" not in name} == {
        "intel-rapl:0": 9.0, "intel-rapl:1": 9.0, "gpu 0": 5.0}
    after = before | {"intel-rapl:0": 9.5, "intel-rapl:1": 2.0, "gpu 0": 8.0}  # the second one has begun again
    assert energy_between(before, after) == pytest.approx((0.5 + 3.0 + 3.0) / 3.6e6)
    assert energy_between({}, {}) is None


def test_a_machine_without_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "_POWERCAP", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_energy() == {} and "kwh" not in Meter().read().figures()
