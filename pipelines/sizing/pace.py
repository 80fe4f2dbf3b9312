"""Seconds of a step of the base and of many products: from datasheets for GPUs, from measured steps for a CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra_core.tree.costs import StepCosts
from pipelines.profiling.cost_cache import fingerprint_of_machine
from pipelines.sizing.amounts import Range
from pipelines.sizing.base import CPU, BaseShape
from pipelines.sizing.hardware import SPAN, Accelerator

KERNELS = (20e-6, 60e-6)
"""Seconds of a layer's kernels, however small they are."""
HOST = (0.05e-3, 0.35e-3)
"""Seconds of the host's work for a sequence in a step. A 135M base on an H200, 256 sequences: 40 to 80 ms a step."""
ROOFLINE = 2.0
"""Time of a step by the datasheet's bandwidth, at most, of that on its roofline. A 7B base on an H200: 1.5."""
PRODUCTS = (0.25, 0.8)
"""Share of the datasheet's operations that products of thousands of rows reach."""
TRAINING = (0.08, 0.5)
"""The same while heads train, whose matrices are smaller and whose softmax is not a product."""
TRAINING_STEP = Range(0.02, 0.25)
"""Seconds of a training step that no operation takes: reading, packing, reducing, logging."""
CPU_SPREAD = (0.8, 1.6)
"""Speeds of one CPU differ by half from day to day."""
CPU_TRAINING = (2.0, 8.0)
"""Seconds of an operation of training on a CPU, in those of the base's largest batch; fp32 takes the longer ones."""


class Pace(Protocol):
    """What takes how long. `by`: what that follows from."""

    @property
    def by(self) -> str: ...

    def step(self, base: BaseShape, rows: int, context: float) -> Range:
        """Seconds of a plain decoding step of `rows` sequences with `context` tokens each."""
        ...

    def forward(self, base: BaseShape, tokens: float) -> Range:
        """Seconds of the base's forward over many tokens, as of prompts."""
        ...

    def training(self, operations: float) -> Range:
        """Seconds of so many floating-point operations of training heads."""
        ...


@dataclass(frozen=True)
class GpuPace:
    """Between the `fast` and the `slow` device, the same one where it is known."""

    fast: Accelerator
    slow: Accelerator

    @property
    def by(self) -> str:
        names = self.fast.name if self.fast == self.slow else f"{self.slow.name} or {self.fast.name}"
        return f"estimated from the datasheet of {names}"

    def step(self, base: BaseShape, rows: int, context: float) -> Range:
        def roof(device: Accelerator) -> float:
            return max((base.read_bytes + rows * context * base.kv_bytes) / device.bandwidth,
                       2 * base.multiplied * rows / device.flops)

        low, high = (kernels * base.config.num_hidden_layers + host * rows for kernels, host in zip(KERNELS, HOST, strict=True))
        return Range(roof(self.fast) + low, ROOFLINE * roof(self.slow) + high)

    def forward(self, base: BaseShape, tokens: float) -> Range:
        operations = 2 * base.multiplied * tokens
        return Range(operations / self.fast.flops / PRODUCTS[1], operations / self.slow.flops / PRODUCTS[0])

    def training(self, operations: float) -> Range:
        return Range(operations / self.fast.flops / TRAINING[1], operations / self.slow.flops / TRAINING[0])


@dataclass(frozen=True)
class CpuPace:
    """From steps of this base that were timed on this machine; `multiplied`: parameters that a token is multiplied with."""

    costs: StepCosts
    multiplied: int
    by: str = "from steps that were timed on this machine"

    def step(self, base: BaseShape, rows: int, context: float) -> Range:
        seconds = self.costs.verify_seconds(rows, 1, round(context))
        return Range(CPU_SPREAD[0] * seconds, CPU_SPREAD[1] * seconds)

    def forward(self, base: BaseShape, tokens: float) -> Range:
        return Range(CPU_SPREAD[0], CPU_SPREAD[1]) * (self._seconds_a_token * tokens)

    def training(self, operations: float) -> Range:
        seconds = self._seconds_a_token * operations / (2 * self.multiplied)
        return Range(CPU_TRAINING[0] * CPU_SPREAD[0] * seconds, CPU_TRAINING[1] * CPU_SPREAD[1] * seconds)

    @property
    def _seconds_a_token(self) -> float:
        """In the largest batch of nodes that was timed."""
        return min(seconds / (rows * nodes) for rows, table in self.costs.verify.items() for nodes, seconds in table.items())


def pace_of(base: BaseShape, gpu: bool, known: Accelerator | None, cache: Path) -> tuple[Pace | None, str]:
    """How fast the base runs, and where that is not known, why."""
    if gpu:
        return (GpuPace(known, known) if known else GpuPace(SPAN[1], SPAN[0])), ""
    costs = timed_costs(base, cache)
    if costs is None:
        return None, f"not known: no step of {base.name} in {base.dtype} was timed on this machine yet"
    return CpuPace(costs, base.multiplied), ""


def timed_costs(base: BaseShape, cache: Path) -> StepCosts | None:
    """The newest times of this base, by name and format, that are cached for this processor."""
    processor = fingerprint_of_machine(CPU)["device"]
    for path in sorted((cache / "costs").glob("verify-*.json"), key=lambda path: -path.stat().st_mtime):
        try:
            found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            name, _, rest = found["timed"]["base"].rpartition("@")
            if found["machine"]["device"] == processor and (name, rest.partition(":")[2]) == (base.name, base.dtype):
                return _costs(found["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _costs(seconds: list[list[float]]) -> StepCosts:
    contexts: dict[int, dict[int, dict[int, float]]] = {}
    for context, rows, nodes, value in seconds:
        contexts.setdefault(int(context), {}).setdefault(int(rows), {})[int(nodes)] = float(value)
    near = min(contexts)
    return StepCosts(contexts[near], {1: {0: 0.0}}, near, {at: table for at, table in contexts.items() if at != near})
