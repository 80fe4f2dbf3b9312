"""The last lines that a person sees on a terminal: what a stage made, where, and its most important figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.runtime.artifacts import StageResult

MOST = 6
"""Figures, and outputs, that a summary shows."""
UNITS = {"speed_vs_plain": "x plain", "tokens_per_step": " tokens/step", "tokens_per_second": " tokens/s"}
PARTS = ("methods", "variants")
"""Figures that hold a row of figures for each contender."""


def summarise(result: StageResult) -> str:
    """A few lines, each ended by a line break: `stage: done`, then figures, then one line for each output."""
    state = "was done already" if result.skipped else "done"
    figures = headline(result.figures)
    lines = [f"{result.stage}: {state}" + (f": {', '.join(figures)}" if figures else "")]
    names = list(result.outputs)[:MOST]
    width = max(map(len, names), default=0)
    lines += [f"  {name:<{width}}  {result.outputs[name]}" for name in names]
    return "\n".join(lines) + "\n"


def headline(figures: Mapping[str, Any]) -> list[str]:
    """At most `MOST` short texts: the contenders with the highest speed where there are some, else the plain figures."""
    found: list[str] = []
    for part in PARTS:
        if isinstance(rows := figures.get(part), Mapping):
            ranked = sorted(rows.items(), key=lambda row: -_rank(row[1]))
            found += [f"{name} {', '.join(texts)}" for name, row in ranked if (texts := _measures(row))]
    found = found[:3]
    found += [f"{name.replace('_', ' ')} {_short(value)}" for name, value in figures.items()
              if isinstance(value, (int, float)) or (isinstance(value, str) and len(value) <= 60)]
    if not found:  # figures of drafters by name, as of `train`, or by name and batch size, as of `tree`
        rows = {name: row for name, row in figures.items() if isinstance(row, Mapping)}
        rows |= {f"{name} at batch {batch}": row for name, by_batch in rows.items() for batch, row in by_batch.items()}
        found = [f"{name} {', '.join(texts)}" for name, row in rows.items() if (texts := _measures(row))]
    return found[:MOST]


def _measures(row: Any) -> list[str]:
    return [f"{_short(row[name])}{unit}" for name, unit in UNITS.items() if _get(row, name) is not None]


def _rank(row: Any) -> float:
    return _get(row, "speed_vs_plain") or _get(row, "tokens_per_step") or 0.0


def _get(row: Any, name: str) -> float | None:
    value = row.get(name) if isinstance(row, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else None


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
