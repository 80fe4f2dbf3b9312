"""Learning curves of the trainings that led to what is compared, over tokens and over device-seconds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from pipelines.compare.lineage import StageRun
from pipelines.compare.records import Curve
from pipelines.tracking import RunReader

POINTS = 200
"""Most points of a curve of losses."""
PAUSE = 20.0
"""A step that took this many times the median waited for something else: a restart, a validation, a machine that slept."""


def learning_curve(reader: RunReader, label: str, training: StageRun) -> Curve | None:
    """The curve of one training, None where its steps were not recorded."""
    if training.run is None or (text := reader.text(training.run.run_id, "curve.jsonl")) is None:
        return None
    records = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not records:
        return None
    held_out = reader.history(training.run.run_id, "held_out.tokens_per_step")
    return curve_of(label, training.part or "heads", records, held_out, devices_of(training))


def devices_of(training: StageRun) -> float:
    """GPUs that each training worker had, 1 for a worker on a CPU."""
    return max(1.0, float(training.params.get("train.workers.gpus", "0") or 0))


def curve_of(label: str, drafter: str, records: Sequence[dict[str, Any]], held_out: Sequence[tuple[int, float]],
             devices: float = 1.0) -> Curve:
    """`records`: of every step (`curve.jsonl`); `held_out`: (steps done, tokens per step) of each validation; `devices`: of each
    worker.

    A step's seconds run from the end of the step before; the first step has the median. Pauses count as one median step, so that
    a training that was killed and went on the next day is not charged for the night.
    """
    times = [float(record["time"]) for record in records if "time" in record]
    gaps = [max(0.0, later - earlier) for earlier, later in pairwise(times)]
    usual = statistics.median(gaps) if gaps else 0.0
    seconds = [usual, *(usual if usual and gap > PAUSE * usual else gap for gap in gaps)]
    seconds += [0.0] * (len(records) - len(seconds))
    tokens = list(accumulate(int(record.get("positions", 0)) for record in records))
    spent = list(accumulate(second * int(record.get("workers", 1)) * devices
                            for second, record in zip(seconds, records, strict=False)))
    ends = _ends(len(records))
    losses = [statistics.fmean(float(record["loss"]) for record in records[start:end])
              for start, end in zip([0, *ends], ends, strict=False)]
    places = [(min(done, len(records)) - 1, value) for done, value in held_out if done > 0]
    return Curve(label, drafter, tuple(tokens[end - 1] for end in ends), tuple(round(spent[end - 1], 2) for end in ends),
                 tuple(round(loss, 5) for loss in losses),
                 tuple((tokens[place], round(spent[place], 2), round(value, 4)) for place, value in places))


def _ends(count: int) -> list[int]:
    """Where the groups of steps end whose losses become one point."""
    groups = min(count, POINTS)
    return [round(count * (group + 1) / groups) for group in range(groups)]
