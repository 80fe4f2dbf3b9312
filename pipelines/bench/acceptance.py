"""How many tokens a step of one contender gives, with an interval: what `serve` compares its traffic with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.bench.plan import Row
from pipelines.runtime.files import write_text
from pipelines.serve.drift import FILE

RESAMPLES = 2000


def acceptance(rows: Iterable[Row], method: str) -> dict[str, Any] | None:
    """Tokens per step of `method`, pooled over its answers, and the 95 % interval over resampled questions (bootstrap); None for
    fewer than two questions with a step."""
    totals: dict[str, list[int]] = {}
    for row in rows:
        if row.method == method and row.steps:
            entry = totals.setdefault(row.question, [0, 0])
            entry[0] += len(row.token_ids) - 1
            entry[1] += row.steps
    if len(totals) < 2:
        return None
    pairs = np.array([totals[question] for question in sorted(totals)])
    draws = np.random.default_rng(0).integers(0, len(pairs), (RESAMPLES, len(pairs)))
    sums = pairs[draws].sum(axis=1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return {"tokens_per_step": round(float(pairs[:, 0].sum() / pairs[:, 1].sum()), 4), "low": round(float(low), 4),
            "high": round(float(high), 4), "questions": len(pairs)}


def write_acceptance(configuration: Path, rows: Iterable[Row], method: str) -> None:
    """Write the interval into a configuration's folder, where there is one."""
    if (found := acceptance(rows, method)) is not None:
        write_text(configuration / FILE, json.dumps(found, indent=2, sort_keys=True))
