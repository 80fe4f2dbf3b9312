"""What a plan says: lines for a person, or fields."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipelines.sizing.amounts import Range, StageSize, size_text, time_text

WITHOUT_BASE = ("compare", "datacard", "promote")
"""Stages that load no base, or its vocabulary alone."""


@dataclass(frozen=True)
class Plan:
    """`steps`: lines of what would run; `base`: figures of the base, empty where it is not known; `sizes`: of each part;
    `unknown`: why there are none, in one line."""

    stage: str
    steps: list[str]
    base: dict[str, Any]
    sizes: list[StageSize]
    unknown: str = ""

    def lines(self) -> list[str]:
        """For a person: the steps, then a line for each place that is needed."""
        if not self.base:
            return [*self.steps, *([f"sizes: {self.unknown}"] if self.unknown else [])]
        head = (f"sizes, estimated: {self.base['name']} in {self.base['dtype']}: {self.base['parameters'] / 1e6:,.0f} million "
                f"parameters, weights {size_text(Range.of(self.base['weight_bytes']))}, keys and values "
                f"{size_text(Range.of(self.base['kv_bytes_a_token']))} and a hidden state "
                f"{size_text(Range.of(self.base['hidden_bytes_a_token']))} a token")
        lines = [*self.steps, head, *(line for size in self.sizes for line in size.lines())]
        timed = [size.seconds for size in self.sizes if size.seconds is not None]
        if len(timed) > 1 and len(timed) >= len(self.sizes) - 1:  # all but an endpoint, which does not end
            lines.append(f"in all: {time_text(sum(timed, Range.of(0)))}")
        return lines

    def to_json(self) -> str:
        """One line: the same numbers as fields, bytes and seconds, estimates as [low, high]."""
        return json.dumps({"stage": self.stage, "plan": self.steps, "base": self.base, "unknown": self.unknown,
                           "sizes": [size.to_json() for size in self.sizes]}, sort_keys=True)
