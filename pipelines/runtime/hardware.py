"""The machine that a process runs on, as far as it decides how long work takes: processor, cores, GPUs.

Fingerprints of what was timed hold its digest, so that times of two machines are never taken for one another's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

UNKNOWN = "a machine that is not recorded"
"""What a result is said to be measured on if it is from a version that did not record the machine."""
SHOWN = 12
"""Characters of a digest."""
SEPARATOR = "@"
"""Between the two parts of a fingerprint of something that was timed: of the request, and of the machine."""
_CPUINFO, _CGROUP = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup/cpu.max")
_FLAGS = re.compile(r"avx.*|amx.*|fma|f16c|neon|asimd.*|sve.*|sme2?|.*bf16|i8mm|dotprod")
"""Instruction sets that matrix products use, by the names that Linux gives them on x86 and ARM."""
_SETS = (("AMX", "amx_tile"), ("AVX-512 BF16", "avx512_bf16"), ("AVX-512", "avx512f"), ("AVX2", "avx2"), ("SVE", "sve"),
         ("NEON", "asimd"))
"""What people call an instruction set, and the flag that tells it; the strongest first."""
_LSCPU_SECONDS = 5


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: its name, how many there are, and the version of the driver."""

    name: str
    count: int
    driver: str


@dataclass(frozen=True)
class Hardware:
    """A machine. `revision`: family, model and stepping of its processor; `flags`: the instruction sets that matter, sorted;
    `cores`: logical ones that this process may use, a container's limit included; `memory`: bytes."""

    cpu: str
    revision: str
    flags: tuple[str, ...]
    cores: float
    memory: int
    gpus: tuple[Gpu, ...] = ()

    @property
    def label(self) -> str:
        """A few words for a person, as "2 cores of Intel Xeon Processor @ 2.80GHz (AMX)"."""
        best = next((name for name, flag in _SETS if flag in self.flags), None)
        words = [f"{gpu.count} x {gpu.name}" for gpu in self.gpus]
        words.append(f"{self.cores:g} core{'s' * (self.cores != 1)} of {self.cpu}" + (f" ({best})" if best else ""))
        return ", ".join(words)

    @property
    def digest(self) -> str:
        """Of all that changes how long something takes. Memory is not part of it, as the kernel keeps another amount after each
        update, nor is the number of GPUs: what is timed runs on one."""
        gpus = [[gpu.name, gpu.driver] for gpu in self.gpus]
        text = json.dumps([self.cpu, self.revision, self.flags, self.cores, gpus])
        return hashlib.sha256(text.encode()).hexdigest()[:SHOWN]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a file beside a result."""
        return asdict(self) | {"flags": list(self.flags), "gpus": [asdict(gpu) for gpu in self.gpus],
                               "label": self.label, "digest": self.digest}


@functools.cache
def this_hardware() -> Hardware:
    """The machine of this process."""
    import psutil

    return read_hardware(_text_of(_CPUINFO), _cores(), psutil.virtual_memory().total, _gpus())


def read_hardware(cpuinfo: str, cores: float, memory: int, gpus: Sequence[Gpu] = ()) -> Hardware:
    """A machine whose `/proc/cpuinfo` has this text, which is empty where there is no such file."""
    first: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            first.setdefault(name.strip(), value.strip())
    arm = [first[name] for name in ("CPU implementer", "CPU part", "CPU variant", "CPU revision") if name in first]
    revision = [first[name] for name in ("cpu family", "model", "stepping") if name in first] or arm
    flags = {flag for name in ("flags", "Features") for flag in first.get(name, "").split() if _FLAGS.fullmatch(flag)}
    name = first.get("model name") or _lscpu_name() or platform.processor() or platform.machine()
    return Hardware(_plain(name), " ".join(revision), tuple(sorted(flags)), cores, memory, tuple(gpus))


def timed_on(fingerprint: str, digest: str) -> str:
    """The fingerprint of something that is timed: that of the request, bound to the machine with this digest."""
    return f"{fingerprint}{SEPARATOR}{digest}"


def request_of(fingerprint: str) -> str:
    """The part of a fingerprint that says what was asked for, whichever machine did it."""
    return fingerprint.partition(SEPARATOR)[0]


def machine_of(fingerprint: str) -> str | None:
    """The digest of the machine in a fingerprint; None in one of an earlier version, which recorded none."""
    return fingerprint.partition(SEPARATOR)[2] or None


def _plain(name: str) -> str:
    """A processor's name without marks and filler: "Intel(R) Xeon(R) CPU @ 2.80GHz" is "Intel Xeon @ 2.80GHz"."""
    return " ".join(re.sub(r"\((R|TM|C)\)|\bCPU\b", " ", name, flags=re.IGNORECASE).split())


def _lscpu_name() -> str | None:
    """The processor's name where the kernel gives numbers alone, as on ARM; None without `lscpu`."""
    try:
        said = subprocess.run(["lscpu"], capture_output=True, text=True, check=True, timeout=_LSCPU_SECONDS,
                              env=os.environ | {"LC_ALL": "C"}).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"^\s*Model name:\s*(\S.*)$", said, re.MULTILINE)
    return found[1].strip() if found and found[1].strip() != "-" else None


def _cores() -> float:
    """Logical cores: those that this process may run on, or what its container may use of them."""
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # not Linux
        cores = float(os.cpu_count() or 1)
    quota, _, period = _text_of(_CGROUP).partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, round(int(quota) / int(period), 2))
    return cores


def _gpus() -> tuple[Gpu, ...]:
    """The machine's NVIDIA GPUs by NVML, which sees them all whichever this process may use; else those that torch sees."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
                     for index in range(pynvml.nvmlDeviceGetCount())]
            driver = str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no such library, no driver, a driver that does not answer: each is an exception of NVML's own
        names, driver = _torch_gpus()
    return tuple(Gpu(name, names.count(name), driver) for name in sorted(set(map(str, names))))


def _torch_gpus() -> tuple[list[str], str]:
    """Names of the GPUs that this process may use, and in place of a driver the version of what torch was built for. torch, which
    takes seconds to import, is asked only where there is a device."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        return [], ""
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return names, str(torch.version.cuda or torch.version.hip or "")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
