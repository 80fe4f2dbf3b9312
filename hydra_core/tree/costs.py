"""Seconds of a decoding step on a machine, by batch size, nodes, depth and context: linear interpolation of measured points."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value", float, NDArray[np.float64])
Surface = Mapping[int, Mapping[int, float]]
"""Batch size -> {nodes or depth: seconds}."""


@dataclass(frozen=True)
class StepCosts:
    """Measured seconds of the two parts of a step. Survives a round trip through JSON unchanged.

    `verify`: batch size -> {nodes per sequence: seconds} of one base forward, commit included, over `context` committed tokens
    per sequence; 1 node is plain decoding.
    `draft`: batch size -> {depth: seconds} of drafting a tree of that depth; depth 0 is drafting without heads.
    `far`: longer context -> the same as `verify` at a few of its points. Attention is linear in context, so the difference to
    `verify` is interpolated between these points and added to `verify`.
    Raises ValueError for a table or batch size without points, and for a context in `far` that is not longer than `context`.
    """

    verify: Surface
    draft: Surface
    context: int = 256
    far: Mapping[int, Surface] = field(default_factory=dict)
    _curves: dict[int, dict[int, dict[int, NDArray[np.float64]]]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, table in (("verify", self.verify), ("draft", self.draft), *(("far", table) for table in self.far.values())):
            if not table or not all(table.values()):
                raise ValueError(f"{name}: no measured points")
        if any(context <= self.context for context in self.far):
            raise ValueError(f"far: contexts must be longer than {self.context}")

    def seconds(self, batch: int, nodes: int, depth: int, context: int = 0) -> float:
        """One step of `batch` sequences of `context` committed tokens with a tree of that size and depth; plain decoding
        (1 node) drafts nothing."""
        return self.verify_seconds(batch, nodes, context) + (self.draft_seconds(batch, depth) if nodes > 1 else 0.0)

    def verify_seconds(self, batch: int, nodes: int, context: int = 0) -> float:
        """The base's part. Sequences shorter than the `context` of the table cost as much as those of that length."""
        near = _at(self.verify, batch, nodes)
        if context <= self.context or not self.far:
            return near
        more = {at: self._more(table, batch, nodes) for at, table in self.far.items()}
        return near + interpolate({self.context: 0.0, **more}, context)

    def verify_curve(self, batch: int, most: int, context: int = 0) -> NDArray[np.float64]:
        """`verify_seconds` of 1, 2, ... `most` nodes: [most] float64."""
        nodes = range(1, most + 1)
        if most not in self._curves:
            self._curves[most] = {0: {size: np.array([interpolate(points, count) for count in nodes])
                                      for size, points in self.verify.items()}}
            for at, table in self.far.items():
                self._curves[most][at] = {0: np.zeros(most)} | {size: np.array([interpolate(points, count) for count in nodes])
                                                                for size, points in self._above(table).items()}
        near, *far = ((at, interpolate(curves, batch)) for at, curves in self._curves[most].items())
        if context <= self.context or not far:
            return near[1]
        return near[1] + interpolate({self.context: np.zeros(most), **dict(far)}, context)

    def draft_seconds(self, batch: int, depth: int) -> float:
        """The drafter's part: the same at any context, since its only attention is one prefix layer."""
        return _at(self.draft, batch, depth)

    def deeper_seconds(self, batch: float, depth: int) -> float:
        """The part of `draft_seconds` that head `depth` (the first is 0) takes; `batch`: paths that it expands, as a number of
        sequences that expand as many as they may."""
        return max(_at(self.draft, batch, depth + 1) - _at(self.draft, batch, depth), 0.0)

    def _more(self, table: Surface, batch: int, nodes: int) -> float:
        """Seconds by which the far `table` lies above `verify`. The difference is 0 for no sequences, so one batch size is enough
        for a slope."""
        return interpolate({0: 0.0, **{size: interpolate(points, nodes) for size, points in self._above(table).items()}}, batch)

    def _above(self, table: Surface) -> Surface:
        return {size: {at: seconds - _at(self.verify, size, at) for at, seconds in points.items()}
                for size, points in table.items()}

    @property
    def most_nodes(self) -> int:
        """Nodes of the largest tree that was measured."""
        return max(nodes for points in self.verify.values() for nodes in points)

    def to_json(self) -> dict[str, Any]:
        """The table with string keys, as JSON needs them."""
        return {"verify": _to_json(self.verify), "draft": _to_json(self.draft), "context": self.context,
                "far": {str(context): _to_json(table) for context, table in self.far.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepCosts:
        """Read the output of `to_json`. Raises KeyError or ValueError for other content."""
        return cls(_from_json(values["verify"]), _from_json(values["draft"]), int(values["context"]),
                   {int(context): _from_json(table) for context, table in values["far"].items()})


def unmeasured_costs() -> StepCosts:
    """A rough guess before anything is measured, in units of a plain step of one sequence: a small bf16 model on a CPU."""
    return StepCosts({1: {1: 1.0, 2: 1.06, 8: 1.15, 16: 1.2, 32: 1.35}, 4: {1: 1.1, 8: 1.5, 32: 2.6},
                      16: {1: 1.5, 8: 3.2, 32: 6.5}, 64: {1: 3.1, 8: 8.3, 32: 30.0}},
                     {1: {0: 0.03, 4: 0.2}, 16: {0: 0.06, 4: 0.5}})


def interpolate(points: Mapping[int, Value], at: float) -> Value:
    """Linear between measured points, with the slope of the last two beyond them; arrays elementwise.

    Raises ValueError for no points.
    """
    keys = sorted(points)
    if not keys:
        raise ValueError("no measured points")
    if len(keys) == 1 or at <= keys[0]:
        return points[keys[0]]
    right = min(bisect_right(keys, at), len(keys) - 1)
    low, high = keys[right - 1], keys[right]
    slope = (points[high] - points[low]) / (high - low)
    if at <= high:
        return points[low] + slope * (at - low)
    # Beyond the last point, noise must not predict ever cheaper steps.
    return points[high] + (np.maximum(slope, 0.0) if isinstance(slope, np.ndarray) else max(slope, 0.0)) * (at - high)


def _at(surface: Surface, batch: float, at: int) -> float:
    return interpolate({size: interpolate(points, at) for size, points in surface.items()}, batch)


def _to_json(surface: Surface) -> dict[str, dict[str, float]]:
    return {str(batch): {str(at): seconds for at, seconds in points.items()} for batch, points in surface.items()}


def _from_json(surface: Mapping[str, Mapping[str, float]]) -> dict[int, dict[int, float]]:
    return {int(batch): {int(at): float(seconds) for at, seconds in points.items()} for batch, points in surface.items()}
