"""The plan of a stage: what it would do, and what that takes."""

from __future__ import annotations

from pipelines.config import RunConfig
from pipelines.runtime.dry_run import describe
from pipelines.sizing.report import WITHOUT_BASE, Plan


def plan_of(config: RunConfig, stage: str) -> Plan:
    """The plan of `stage`. Starts nothing, loads no weights and imports no Ray.

    Raises InputError for what surely does not fit the machines that the settings name, or this one.
    """
    steps = describe(config, stage)
    if stage in WITHOUT_BASE:
        return Plan(stage, steps, {}, [])
    from pipelines.sizing.estimate import estimate  # imports torch

    return estimate(config, stage, steps)
