"""The machine that results are bound to."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.runtime import hardware
from pipelines.runtime.hardware import Gpu, machine_of, read_hardware, request_of, this_hardware, timed_on

X86 = """processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) CPU @ 2.80GHz
stepping\t: 8
flags\t\t: fpu smep fma avx2 avx512f avx512_bf16 amx_tile amx_bf16

processor\t: 1
model name\t: something else
"""
ARM = """processor\t: 0
Features\t: fp asimd i8mm bf16 sve
CPU implementer\t: 0x41
CPU variant\t: 0x1
CPU part\t: 0xd40
CPU revision\t: 1
"""


def test_a_processor_by_its_words() -> None:
    found = read_hardware(X86, 2, 8 << 30)
    assert found.label == "2 cores of Intel Xeon @ 2.80GHz (AMX)" and found.revision == "6 143 8"
    assert found.flags == ("amx_bf16", "amx_tile", "avx2", "avx512_bf16", "avx512f", "fma")
    with_gpus = replace(found, gpus=(Gpu("NVIDIA H200", 8, "570.1"),), cores=1)
    assert with_gpus.label == "8 x NVIDIA H200, 1 core of Intel Xeon @ 2.80GHz (AMX)"


def test_a_processor_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_lscpu_name", lambda: "Neoverse-V1")
    found = read_hardware(ARM, 4, 1)
    assert found.label == "4 cores of Neoverse-V1 (SVE)" and found.revision == "0x41 0xd40 0x1 1"
    assert {"bf16", "i8mm"} <= set(found.flags)
    assert read_hardware("", 1, 1).cpu  # no such file


def test_the_digest_is_of_what_changes_times() -> None:
    found = read_hardware(X86, 2, 8 << 30)
    gpus = (Gpu("NVIDIA H200", 8, "570.1"),)
    assert replace(found, memory=9 << 30).digest == found.digest
    others = [replace(found, cores=4), replace(found, revision="6 143 9"), replace(found, flags=()), replace(found, gpus=gpus),
              replace(found, gpus=(Gpu("NVIDIA H200", 8, "580.1"),))]
    assert len({found.digest, *(other.digest for other in others)}) == 1 + len(others)
    one = replace(found, gpus=(Gpu("NVIDIA H200", 1, "570.1"),))  # what is timed runs on one of them
    assert one.digest == replace(found, gpus=gpus).digest


def test_this_machine() -> None:
    found = this_hardware()
    assert found.cores >= 0.01 and found.memory > 1 << 20 and f"{found.cores:g} core" in found.label
    assert found.to_json()["digest"] == found.digest


def test_a_container_may_have_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path / "cpu.max")
    whole = hardware._cores()
    (tmp_path / "cpu.max").write_text("max 100000\n", encoding="ascii")
    assert hardware._cores() == whole
    (tmp_path / "cpu.max").write_text("50000 100000\n", encoding="ascii")
    assert hardware._cores() == 0.5


def test_gpus_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray hides them from a worker that has reserved none."""
    names = ["NVIDIA H200", "NVIDIA L4", "NVIDIA H200"]
    library = SimpleNamespace(
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetName=lambda handle: names[handle],
        nvmlSystemGetDriverVersion=lambda: "570.1")
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert hardware._gpus() == (Gpu("NVIDIA H200", 2, "570.1"), Gpu("NVIDIA L4", 1, "570.1"))


def test_a_fingerprint_of_something_timed() -> None:
    bound = timed_on("ab" * 32, "0123456789ab")
    assert request_of(bound) == request_of("ab" * 32) == "ab" * 32
    assert machine_of(bound) == "0123456789ab" and machine_of("ab" * 32) is None
