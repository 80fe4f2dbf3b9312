"""What more prompts cost: the seconds of this run's own `distill` and trainings, carried on."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.config import RunConfig
from pipelines.curve.points import Trained
from pipelines.runtime.artifacts import RunPaths, require_manifest
from pipelines.runtime.provenance import provenance


@dataclass(frozen=True)
class Cost:
    """`prompts` further prompts: seconds to distill them and to train one drafter on their rows as the largest share was trained.

    `rows`: training rows that they make; `distill`: None where the finished `distill` does not tell how long its rows took;
    `machine`: where `distill` and the trainings ran.
    """

    prompts: int
    rows: int
    distill: float | None
    train: float
    machine: str

    @property
    def sentence(self) -> str:
        """For a person."""
        trained = f"{duration(self.train)} to train a drafter on them"
        if self.distill is None:
            return (f"{self.prompts:,} more prompts make {self.rows:,} training rows and cost {trained} on {self.machine}; how "
                    "long `distill` took for its rows is not recorded")
        return (f"{self.prompts:,} more prompts cost {duration(self.distill + self.train)} on {self.machine}: "
                f"{duration(self.distill)} to distill them and {trained} ({self.rows:,} rows)")


def cost_of(config: RunConfig, trained: Sequence[Trained]) -> Cost:
    """The cost of `curve.more_prompts` further prompts, by the mean pace of the trainings with the most rows."""
    manifest = require_manifest(folder := RunPaths.of(config).stage("distill"), "distill")
    figures = manifest["result"]["figures"]
    largest = max(one.point.rows for one in trained)
    pace = statistics.fmean(one.seconds / one.point.rows for one in trained if one.point.rows == largest)
    kept = (1 - config.distill.held_out) * config.train.share
    answers = config.curve.more_prompts * len(config.distill.temperatures)
    rows = round(answers * kept)
    fresh = figures.get("responses", 0) - figures.get("resumed", 0)  # those of which the manifest's seconds tell
    distill = manifest["seconds"] / fresh * answers if fresh > 0 else None
    here = machine_name(provenance(config))
    path = folder / "provenance.json"
    there = machine_name(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else here
    named = f"this machine ({here})" if there == here else f"{there} for `distill` and this machine ({here}) for training"
    return Cost(config.curve.more_prompts, rows, distill, pace * rows, named)


def machine_name(origin: Mapping[str, Any]) -> str:
    """The machine of a `provenance.json`, in words."""
    if label := (origin.get("hardware") or {}).get("label"):
        return str(label)
    cpus = origin.get("cpus")  # as an earlier version wrote it
    return f"{cpus} CPU{'' if cpus == 1 else 's'} of {origin.get('processor') or 'an unknown processor'}"


def duration(seconds: float) -> str:
    """Seconds for a person, with two or three digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
