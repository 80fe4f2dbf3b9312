"""The `curve` stage: tokens per step over the number of training rows, and what more rows would bring and cost.

    train/DRAFTER.shareS.seedN/   one training, as the `train` stage writes it; a finished one is not trained again
    curve/report.json, report.md, curve.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.ablate.variants import training_ids
from pipelines.config import RunConfig
from pipelines.curve.cost import Cost, cost_of
from pipelines.curve.points import STAGE, drafters_of, plan_points, train_points
from pipelines.curve.power_law import PowerLaw
from pipelines.curve.report import answers, markdown, plot_curves, terminal_table
from pipelines.curve.results import BackTest, Curve, curves_of
from pipelines.distill.stage import distilled
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, stage_folder
from pipelines.runtime.console import say
from pipelines.runtime.files import write_text
from pipelines.tracking import Tracker


def run_curve(config: RunConfig) -> StageResult:
    """Train every point of the curve that is not trained yet, then fit it and write the report.

    Figures: drafter -> tokens per step with all rows, the curve's parameters, what it foretells and its back-test. Raises
    InputError for a drafter that is not configured and for shares with too few rows, before anything is trained; and whatever
    `train` raises.
    """
    drafters = drafters_of(config)
    tracker = Tracker.open(config)
    digest = distilled(config)[1]
    points = plan_points(config, training_ids(config))
    trained = train_points(config, points)
    curves = curves_of(trained, {name: config.train.drafters[name].num_heads + 1.0 for name in drafters}, config.curve.ahead)
    cost = cost_of(config, trained)
    folder, wanted = RunPaths.of(config).stage(STAGE), fingerprint(STAGE, {}, {"distill": digest})
    report = json.dumps({"drafters": {name: curve.figures() for name, curve in curves.items()}, "cost": asdict(cost),
                         "answers": [line for name, curve in curves.items() for line in answers(name, curve)],
                         "steps_per_share": config.curve.steps_per_share}, indent=2)
    done = finished(folder, wanted)
    if done is not None and (folder / "report.json").read_text(encoding="utf-8") == report:
        return done
    # with other shares, seeds or drafters over the same rows the report is written again, and finished trainings are kept
    with stage_folder(config, STAGE, folder, wanted) as stage, tracker.start(STAGE, fingerprint=wanted) as run:
        files = _write(folder, curves, cost, report)
        run.log_metrics(_metrics(curves, cost))
        for path in files:
            run.log_artifact(path)
        terminal_table(curves).show()
        for line in [*(line for name, curve in curves.items() for line in answers(name, curve)), cost.sentence]:
            say(STAGE, line)
        outputs = {"report": str(folder / "report.md"), "plot": str(folder / "curve.png")}
        figures = {name: _headline(curve) for name, curve in curves.items()}
        return stage.finish(StageResult(STAGE, run.run_id, outputs, figures), files)


def _headline(curve: Curve) -> dict[str, Any]:
    """One drafter's figures for the line that the command prints."""
    return {"tokens_per_step": round(curve.points[-1].tokens_per_step, 4), **curve.figures()}


def _metrics(curves: Mapping[str, Curve], cost: Cost) -> dict[str, float]:
    """Numbers by name, for MLflow."""
    found: dict[str, float] = {"more_prompts.train_seconds": cost.train}
    found |= {} if cost.distill is None else {"more_prompts.distill_seconds": cost.distill}
    for name, curve in curves.items():
        found[f"{name}.tokens_per_step"] = curve.points[-1].tokens_per_step
        if isinstance(curve.law, PowerLaw):
            found |= {f"{name}.ceiling": curve.law.ceiling, f"{name}.exponent": curve.law.exponent}
        for one in curve.ahead:
            times = f"{name}.at_{one.rows / curve.points[-1].rows:g}x"
            found |= {times: one.tokens_per_step, f"{times}.low": one.low, f"{times}.high": one.high}
        if isinstance(curve.backtest, BackTest):
            found[f"{name}.backtest_held"] = float(curve.backtest.held)
    return found


def _write(folder: Path, curves: Mapping[str, Curve], cost: Cost, report: str) -> list[Path]:
    write_text(folder / "report.json", report)
    write_text(folder / "report.md", markdown(curves, cost))
    plot_curves(folder / "curve.png", curves)
    return [folder / "report.json", folder / "report.md", folder / "curve.png"]
