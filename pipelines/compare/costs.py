"""What each stage took: wall time, device-seconds, CPU- and GPU-seconds, tokens and energy, as far as they were recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.compare.lineage import StageRun
from pipelines.compare.records import Cost

HARDWARE, MACHINE = "hydra_heads.hardware", "hydra_heads.hardware_digest"
"""Tags of a run: the machine in words, and a digest that is the same for machines that are alike."""
TOKENS = ("training_tokens", "response_tokens", "tokens")
"""Figures of stages that count tokens, the one that says most first."""


def cost_of(label: str, one: StageRun) -> Cost:
    """The cost of one stage's run."""
    figures = recorded_figures(one)
    seconds = figures.get("seconds", _number(one.manifest.get("seconds")))
    if seconds is None and one.run is not None and one.run.ended is not None:
        seconds = one.run.ended - one.run.started
    tokens = next((figures[name] for name in TOKENS if name in figures), None)
    return Cost(
        label, f"{one.stage} {one.part}" if one.part else one.stage, hardware_of(one), seconds, figures.get("device_seconds"),
        figures.get("cpu_seconds"), figures.get("gpu_seconds"), None if tokens is None else int(tokens), figures.get("kwh"))


def recorded_figures(one: StageRun) -> dict[str, float]:
    """The numbers of a stage's result and of its run in MLflow, by name; the run's count where both have one."""
    result = one.manifest.get("result") or {}
    figures: Mapping[str, Any] = result.get("figures") or {}
    found = {name: number for name, value in figures.items() if (number := _number(value)) is not None}
    return found | (dict(one.run.metrics) if one.run is not None else {})


def hardware_of(one: StageRun) -> str | None:
    return one.run.tags.get(HARDWARE) if one.run is not None else None


def machine_of(one: StageRun) -> str | None:
    """What the runs of machines that are alike have in common."""
    return (one.run.tags.get(MACHINE) or one.run.tags.get(HARDWARE)) if one.run is not None else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
