"""`tree.curves=true`: how the time of a step grows with nodes, batch size and context, up to the base's longest context.

    RUN/tree/curves/curves.json, curves.md, curves.png

It needs no heads, and works in a run whose trees are chosen already.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray
import torch

from hydra_core.base import resolve_base
from hydra_core.storage import as_path
from hydra_core.tree.costs import StepCosts
from pipelines.config import RunConfig
from pipelines.profiling.cost_cache import fingerprint_of_machine, machine_costs, step_curves
from pipelines.profiling.report import curve_tables, errors, markdown, plot_curves
from pipelines.profiling.step_timing import Point
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, stage_folder
from pipelines.runtime.files import write_text
from pipelines.runtime.hardware import timed_on
from pipelines.runtime.lock import only_run
from pipelines.runtime.logs import speak
from pipelines.runtime.measuring import MeasuringPlace, leave_times_of_another_machine
from pipelines.runtime.ray_cluster import ensure_ray, measuring_resources
from pipelines.tracking import Tracker, hardware_tags

STAGE, CURVES = "tree", "curves"


@dataclass(frozen=True)
class Curves:
    """Seconds by (context, batch size, nodes); the cost table that trees are chosen with; and the machine of both."""

    points: dict[Point, float]
    costs: StepCosts
    machine: dict[str, Any]


def run_curves(config: RunConfig, tracker: Tracker, place: MeasuringPlace) -> StageResult:
    """Measure the curves on `place`, or read those that this run has measured there, and print them.

    Figures: relative errors of the cost table at these points.
    """
    folder, cache = RunPaths.of(config).stage(STAGE, CURVES), RunPaths.of(config).cache
    asked = fingerprint(STAGE, {CURVES: config.base.model_dump(mode="json"), "threads": config.tree.threads},
                        {"base": resolve_base(config.base.model, cache).digest})
    wanted = timed_on(asked, place.hardware.digest)
    if (done := finished(folder, wanted, (asked,))) is None:
        with ExitStack() as held:
            held.enter_context(only_run(folder, as_path(config.storage)))
            leave_times_of_another_machine(STAGE, folder, wanted, place)
            held.enter_context(ensure_ray(config))
            stage = held.enter_context(stage_folder(config, STAGE, folder, wanted))
            run = held.enter_context(tracker.start(STAGE, part=CURVES, fingerprint=wanted))
            run.set_tags(hardware_tags(place.hardware))
            task = ray.remote(measure_curves).options(**measuring_resources(config), **place.options)
            found: Curves = ray.get(task.remote(config.model_dump(mode="json", by_alias=True)))
            off = errors(found.costs, found.points)
            write_text(folder / "curves.json", json.dumps(
                {"machine": found.machine, "errors": off, "points": [[*point, value] for point, value in found.points.items()]}))
            write_text(folder / "curves.md", _page(config, found, off))
            plot_curves(folder / "curves.png", found.points, f"{config.base.model} in {config.base.dtype}: a step of the base")
            files = [place.record(folder), *(folder / f"curves.{ending}" for ending in ("json", "md", "png"))]
            for path in files:
                run.log_artifact(path)
            run.describe(f"the cost table is within {100 * off['median_error']:.1f} % of {off['points']} points in the median",
                         (folder / "curves.md").read_text(encoding="utf-8"), ("curves.png",))
            run.log_metrics({f"{CURVES}.{name}": float(value) for name, value in off.items()})
            done = stage.finish(StageResult(STAGE, run.run_id, {CURVES: str(folder / "curves.png")}, dict(off)), files)
    kept = json.loads((folder / "curves.json").read_text(encoding="utf-8"))["points"]
    points = {(context, batch, nodes): value for context, batch, nodes, value in kept}
    for table in curve_tables(points, config.base.dtype):
        table.show()
    return done


def measure_curves(values: dict[str, Any]) -> Curves:
    """Measure everything in this one Ray task, so that nothing else of the run disturbs the times."""
    speak()
    config = RunConfig.model_validate(values)
    torch.set_num_threads(config.tree.threads)
    cache = RunPaths.of(config).cache
    base = config.base.load(cache)
    return Curves(step_curves(base, cache), machine_costs(base, cache, None, config.tree), fingerprint_of_machine(base.device))


def _page(config: RunConfig, found: Curves, off: dict[str, float | int]) -> str:
    lines = [f"On {', '.join(f'{name}: {value}' for name, value in found.machine.items())}.", "",
             f"The cost table that trees are chosen with predicts these {off['points']} points within "
             f"{100 * off['median_error']:.1f} % in the median, {100 * off['largest_error']:.1f} % at most."]
    return markdown(f"{config.base.model}: what a step of the base takes", lines, curve_tables(found.points, config.base.dtype))
