"""Ranges of bytes and seconds: an estimate is two ends, and what is known exactly has both ends equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both at least 0."""

    low: float
    high: float

    @classmethod
    def of(cls, value: float) -> Range:
        """One exact value."""
        return cls(value, value)

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, by: float) -> Range:
        return Range(self.low * by, self.high * by)

    def times(self, other: Range) -> Range:
        """The product of two quantities that vary independently."""
        return Range(self.low * other.low, self.high * other.high)

    def to_json(self) -> list[int | float]:
        """[low, high]; whole numbers from 100 on."""
        return [round(end) if end >= 100 else round(end, 3) for end in (self.low, self.high)]


Parts = Mapping[str, Range]
"""Name of a part -> bytes."""


def total(parts: Parts) -> Range:
    """The sum of all parts."""
    return sum(parts.values(), Range.of(0))


@dataclass(frozen=True)
class StageSize:
    """What one stage, or one drafter's part of it, takes.

    Bytes of each of `workers` workers: `device` on its GPU (empty: it uses none), `memory` of its machine, `scratch` below its
    /tmp. Bytes in all: `driver` memory, `storage` written below the storage root, of which `stored` are there already, and
    `network` between machines and storage. `seconds`: from the start to the end, None where it is not known; `by`: what the
    time follows from, or why there is none; `notes`: sentences. `per_gpu`: workers that share a GPU.
    """

    name: str
    workers: int = 1
    device: Parts = field(default_factory=dict)
    memory: Parts = field(default_factory=dict)
    scratch: Parts = field(default_factory=dict)
    driver: Parts = field(default_factory=dict)
    storage: Parts = field(default_factory=dict)
    stored: int = 0
    network: Parts = field(default_factory=dict)
    seconds: Range | None = None
    by: str = ""
    notes: tuple[str, ...] = ()
    per_gpu: int = 1

    def to_json(self) -> dict[str, Any]:
        """The same numbers as fields: ranges as [low, high], bytes and seconds."""
        parts = {name: {part: amount.to_json() for part, amount in getattr(self, name).items()}
                 for name in ("device", "memory", "scratch", "driver", "storage", "network")}
        in_all = {name: (total(getattr(self, name)) * self.workers).to_json() for name in ("device", "memory", "scratch")}
        return {"name": self.name, "workers": self.workers, **parts, "in_all": in_all, "stored": self.stored,
                "seconds": None if self.seconds is None else self.seconds.to_json(), "by": self.by, "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """The same for a person, a line for each place."""
        count = self.workers
        each = f"each of {count} workers" if count > 1 else "its worker"
        shared = [(f"GPU memory of {each}", self.device), (f"memory of {each}", self.memory), (f"/tmp of {each}", self.scratch)]
        alone = [("memory of the driver", self.driver), ("storage", self.storage), ("network, in all", self.network)]
        found = [self._line(place, parts, count) for place, parts in shared if parts]
        found += [self._line(place, parts) for place, parts in alone if parts]
        if self.stored:
            found.append(f"{self.name}: {size_text(Range.of(self.stored))} of the storage's part are written already")
        found.append(f"{self.name}: time: {f'{time_text(self.seconds)} ({self.by})' if self.seconds else self.by}")
        return [*found, *(f"{self.name}: {note}" for note in self.notes)]

    def _line(self, place: str, parts: Parts, count: int = 1) -> str:
        in_all = f", in all {size_text(total(parts) * count)}" if count > 1 else ""
        return f"{self.name}: {place}: {size_text(total(parts))}{in_all}{_split(parts)}"


def _split(parts: Parts) -> str:
    if len(parts) == 1:
        return f" ({next(iter(parts))})"
    return f" ({', '.join(f'{name} {size_text(amount)}' for name, amount in parts.items())})"


def size_text(amount: Range) -> str:
    """`1.5 to 2.3 GiB`, or one number where both ends read alike."""
    return _text(amount, (("B", 1), ("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40)))


def time_text(amount: Range) -> str:
    """`2 to 5 min`."""
    return _text(amount, (("s", 1), ("min", 60), ("h", 3600), ("days", 86400)))


def _text(amount: Range, units: tuple[tuple[str, int], ...]) -> str:
    def unit_of(value: float) -> tuple[str, int]:
        return next(((name, size) for name, size in reversed(units) if value >= 0.995 * size), units[0])

    unit, size = unit_of(amount.high)
    low, high = (_number(end / size) for end in (amount.low, amount.high))
    if low == high:
        return f"{high} {unit}"
    if amount.low < 0.1 * amount.high:  # in the larger unit it would be a fraction
        unit_low, size_low = unit_of(amount.low)
        return f"{_number(amount.low / size_low)} {unit_low} to {high} {unit}"
    return f"{low} to {high} {unit}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.2g}" if value < 9.95 else f"{value:.0f}"
