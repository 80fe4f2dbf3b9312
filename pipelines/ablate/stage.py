"""`ablate`: variants of training on the same rows, each with its seeds, and a table and plot for every question asked.

    train/VARIANT.seedN/     each training, as the `train` stage leaves it; what stands is not trained again
    ablate/report.json, report.md, ablations.png
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_core.errors import InputError
from pipelines.ablate.report import markdown, plot_studies, tokens_cell
from pipelines.ablate.results import Measured
from pipelines.config import RunConfig
from pipelines.config.ablate import Variant, folder_name
from pipelines.distill.stage import distilled
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, stage_folder, write_text
from pipelines.tracking import Tracker
from pipelines.train.stage import run_train

STAGE = "ablate"


def run_ablate(config: RunConfig) -> StageResult:
    """Train what does not stand yet, then report. Raises InputError for no variants, and as `train` does."""
    variants = config.ablate.variants
    if not variants:
        raise InputError("ablate.variants: is empty: name variants, as jobs/configs/ablations/ does")
    tracker = Tracker.open(config)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, variant in variants.items():
        for seed in variant.seeds:
            _say(f"ablate: {name}, seed {seed}")
            label = training_name(name, seed)
            result = run_train(variant_config(config, label, variant, seed))
            found.setdefault(name, []).append(result.figures[label])
    measured = {name: summarise(figures) for name, figures in found.items()}
    folder, wanted = RunPaths.of(config).stage(STAGE), fingerprint(STAGE, {}, {"distill": distilled(config)[1]})
    report = _report(config, found, measured)
    done = finished(folder, wanted)
    if done is not None and (folder / "report.json").read_text(encoding="utf-8") == report:
        return done
    # other variants or questions over the same rows: the report is made anew, trainings stand
    with stage_folder(config, STAGE, folder, wanted) as stage, tracker.start(STAGE, fingerprint=wanted) as run:
        files = _write(folder, config, measured, report)
        run.log_metrics({f"{name}.tokens_per_step": one.tokens_per_step for name, one in measured.items()})
        for path in files:
            run.log_artifact(path)
        _print(measured)
        return stage.finish(StageResult(STAGE, run.run_id, {"report": str(folder / "report.md")}, {
            "variants": {name: vars(one) for name, one in measured.items()}}), files)


def variant_config(config: RunConfig, label: str, variant: Variant, seed: int) -> RunConfig:
    """The run in which `variant` is the one drafter, named `label`."""
    train = config.train.model_copy(update={
        "drafters": {label: variant.heads}, "start": {}, "only": None, "seed": seed, "share": variant.share or config.train.share,
        "epochs": variant.epochs or config.train.epochs})
    return config.model_copy(update={"train": train})


def training_name(variant: str, seed: int) -> str:
    """What a training is called among drafters and folders."""
    return f"{folder_name(variant)}.seed{seed}"


def summarise(figures: list[dict[str, Any]]) -> Measured:
    """One variant's figures over its seeds."""
    values = [one["tokens_per_step"] for one in figures]
    tops = [one["top1"] for one in figures]
    spread = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measured(len(values), statistics.fmean(values), spread, tuple(map(statistics.fmean, zip(*tops, strict=True))),
                    figures[0]["response_tokens"], figures[0]["steps"], statistics.fmean(one["seconds"] for one in figures))


T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % by degrees of freedom; more seeds than ten are as ten."""


def _studies(config: RunConfig) -> dict[str, tuple[str, ...]]:
    return config.ablate.studies or {"All variants": tuple(config.ablate.variants)}


def _report(config: RunConfig, found: dict[str, list[dict[str, Any]]], measured: dict[str, Measured]) -> str:
    variants = {name: vars(one) | config.ablate.variants[name].model_dump(mode="json") for name, one in measured.items()}
    return json.dumps({"variants": variants, "studies": _studies(config), "trainings": found}, indent=2)


def _write(folder: Path, config: RunConfig, measured: dict[str, Measured], report: str) -> list[Path]:
    studies = _studies(config)
    write_text(folder / "report.json", report)
    write_text(folder / "report.md", markdown(studies, measured))
    plot_studies(folder / "ablations.png", studies, measured)
    return [folder / "report.json", folder / "report.md", folder / "ablations.png"]


def _print(measured: dict[str, Measured]) -> None:
    table = Table("variant", "tokens per step", "top-1 by head", "response tokens", "minutes", title="Held-out rows")
    for name, one in measured.items():
        table.add_row(name, tokens_cell(one), " ".join(f"{top:.3f}" for top in one.top1),
                      f"{one.response_tokens:,}", f"{one.seconds / 60:.1f}")
    Console(file=sys.stderr, width=130).print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
