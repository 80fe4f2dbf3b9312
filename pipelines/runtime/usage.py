"""What work took: processor time, the time of processes and GPUs, and energy where the machine counts it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.runtime.files import write_text

FILE = "usage.json"
"""In a stage's folder: what its commands took so far. Work of a command that was killed is not in it."""
LONGEST_PAUSE = 600.0
"""Seconds; a longer time between two steps is not work: the run was stopped, and continued by a later command."""
_POWERCAP = Path("/sys/class/powercap")
_JOULES = 3.6e6
"""Of a kilowatt-hour."""


@dataclass(frozen=True)
class Usage:
    """`device_seconds`: seconds times GPUs, or times processes where there are none; `gpu_seconds`: seconds times GPUs;
    `cpu_seconds`: processor time of the processes that work, None where they are not all seen; `kwh`: of the whole machine, None
    where it has no counter that may be read."""

    device_seconds: float
    gpu_seconds: float = 0.0
    cpu_seconds: float | None = None
    kwh: float | None = None

    def figures(self) -> dict[str, float]:
        """What is known, rounded, for a stage's result."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items() if value is not None}

    def plus(self, other: Usage) -> Usage:
        """The sum. What one of the two does not know is not known of both."""
        return Usage(self.device_seconds + other.device_seconds, self.gpu_seconds + other.gpu_seconds,
                     _sum(self.cpu_seconds, other.cpu_seconds), _sum(self.kwh, other.kwh))

    def added_to(self, folder: Path) -> Usage:
        """The sum with what earlier commands of this stage took, as `folder` says; it is kept there."""
        total = self
        with suppress(OSError, ValueError, TypeError):  # the first command
            total = self.plus(Usage(**json.loads((folder / FILE).read_text(encoding="utf-8"))))
        write_text(folder / FILE, json.dumps(asdict(total)))
        return total


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


@dataclass
class Meter:
    """Counts from its creation on, in the process that works."""

    processes: float = 1.0
    gpus: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)
    energy: dict[str, float] = field(default_factory=lambda: read_energy())

    def read(self) -> Usage:
        """What was used since then."""
        seconds = time.perf_counter() - self.began
        return Usage(seconds * (self.gpus or self.processes), seconds * self.gpus, time.process_time() - self.cpu,
                     energy_between(self.energy, read_energy()))


def time_of_steps(records: Iterable[Mapping[str, Any]], gpus: float) -> Usage:
    """What a training took by its curve, from its first step to its last one, with each step's `workers`, of `gpus` GPUs each, at
    work. A later command of the same training goes on with the curve."""
    total, last = 0.0, None
    for record in records:
        now = float(record["time"])
        if last is not None and now - last <= LONGEST_PAUSE:
            total += (now - last) * int(record.get("workers", 1))
        last = now
    return Usage(total * (gpus or 1.0), total * gpus)


def read_energy() -> dict[str, float]:
    """Counter -> joules so far: the processors' packages by RAPL, which mostly only root may read, and GPUs by NVML."""
    found: dict[str, float] = {}
    for zone in sorted(_POWERCAP.glob("intel-rapl:[0-9]*")):
        if zone.name.count(":") == 1:  # a package, of which others are parts
            with suppress(OSError, ValueError):
                found[zone.name] = int((zone / "energy_uj").read_text(encoding="ascii")) / 1e6
                found[f"{zone.name} range"] = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
    with suppress(Exception):  # no such library or driver, or a GPU without a counter: NVML's own exceptions
        import pynvml

        pynvml.nvmlInit()
        try:
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                found[f"gpu {index}"] = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        finally:
            pynvml.nvmlShutdown()
    return found


def energy_between(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Kilowatt-hours between two readings, None without a counter. One that has begun again from zero is followed once."""
    counters = [name for name in before if not name.endswith(" range") and name in after]
    if not counters:
        return None
    joules = 0.0
    for name in counters:
        spent = after[name] - before[name]
        joules += spent if spent >= 0 else spent + before.get(f"{name} range", -spent)
    return joules / _JOULES
