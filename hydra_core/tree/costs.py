"""What a decoding step takes on a machine, by rows, nodes and depth: measured points and straight lines between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StepCosts:
    """Measured seconds of a step's two parts.

    `verify`: batch size -> {nodes: seconds} of one base forward, commit included; 1 node is plain decoding.
    `draft`: batch size -> {depth: seconds} of growing a tree that deep; depth 0 is what drafting costs before any head.
    Raises ValueError unless both know some batch size, and each of those a point.
    """

    verify: Mapping[int, Mapping[int, float]]
    draft: Mapping[int, Mapping[int, float]]

    def __post_init__(self) -> None:
        for name, table in (("verify", self.verify), ("draft", self.draft)):
            if not table or not all(table.values()):
                raise ValueError(f"{name}: no measured points")

    def seconds(self, batch: int, nodes: int, depth: int) -> float:
        """One step of `batch` rows with a tree of that size and depth; plain decoding (1 node) drafts nothing."""
        return self.verify_seconds(batch, nodes) + (self.draft_seconds(batch, depth) if nodes > 1 else 0.0)

    def verify_seconds(self, batch: int, nodes: int) -> float:
        return interpolate({size: interpolate(points, nodes) for size, points in self.verify.items()}, batch)

    def draft_seconds(self, batch: int, depth: int) -> float:
        return interpolate({size: interpolate(points, depth) for size, points in self.draft.items()}, batch)

    @property
    def most_nodes(self) -> int:
        """The largest tree that was measured."""
        return max(nodes for points in self.verify.values() for nodes in points)

    def to_json(self) -> dict[str, dict[str, dict[str, float]]]:
        return {name: {str(batch): {str(at): seconds for at, seconds in points.items()} for batch, points in table.items()}
                for name, table in (("verify", self.verify), ("draft", self.draft))}

    @classmethod
    def from_json(cls, values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> StepCosts:
        """Read what `to_json` wrote. Raises KeyError or ValueError when it is something else."""
        return cls(*({int(batch): {int(at): float(seconds) for at, seconds in points.items()}
                      for batch, points in values[name].items()} for name in ("verify", "draft")))


def unmeasured_costs() -> StepCosts:
    """In plain steps of one row, before anything is measured: what a small model on a CPU takes in bf16, roughly."""
    return StepCosts({1: {1: 1.0, 2: 1.06, 8: 1.15, 16: 1.2, 32: 1.35}, 4: {1: 1.1, 8: 1.5, 32: 2.6},
                      16: {1: 1.5, 8: 3.2, 32: 6.5}, 64: {1: 3.1, 8: 8.3, 32: 30.0}},
                     {1: {0: 0.03, 4: 0.2}, 16: {0: 0.06, 4: 0.5}})


def interpolate(points: Mapping[int, float], at: int) -> float:
    """Linear between measured points, the slope of the last two beyond them. Raises ValueError for no points."""
    keys = sorted(points)
    if not keys:
        raise ValueError("no measured points")
    if len(keys) == 1 or at <= keys[0]:
        return points[keys[0]]
    right = min(bisect_right(keys, at), len(keys) - 1)
    low, high = keys[right - 1], keys[right]
    slope = (points[high] - points[low]) / (high - low)
    # Beyond the last point noise must not promise ever cheaper steps.
    return points[high] + max(slope, 0.0) * (at - high) if at > high else points[low] + slope * (at - low)
