"""The `ablate` stage: variants of training on the same rows, each with several seeds, compared by question.

    train/VARIANT.seedN/     one training, as the `train` stage writes it; a finished one is not trained again
    ablate/report.json, report.md, ablations.png
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from pipelines.ablate.report import markdown, plot_studies, terminal_table
from pipelines.ablate.results import Measured
from pipelines.config import RunConfig
from pipelines.config.ablate import Variant, folder_name
from pipelines.distill.stage import distilled
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, stage_folder
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import write_text
from pipelines.tracking import Tracker
from pipelines.train.stage import run_train

STAGE = "ablate"


def run_ablate(config: RunConfig) -> StageResult:
    """Train every variant that is not trained yet, then write the report.

    Raises InputError when there are no variants, and whatever `train` raises.
    """
    variants = config.ablate.variants
    if not variants:
        raise InputError("ablate.variants: is empty: name variants, as jobs/configs/ablations/ does")
    tracker = Tracker.open(config)
    found = _trained(config, variants)
    measured = {name: summarise(figures) for name, figures in found.items()}
    folder, wanted = RunPaths.of(config).stage(STAGE), fingerprint(STAGE, {}, {"distill": distilled(config)[1]})
    report = _report(config, found, measured)
    done = finished(folder, wanted)
    if done is not None and (folder / "report.json").read_text(encoding="utf-8") == report:
        return done
    # with other variants or questions over the same rows the report is written again, and finished trainings are kept
    with stage_folder(config, STAGE, folder, wanted) as stage, tracker.start(STAGE, fingerprint=wanted) as run:
        files = _write(folder, config, measured, report)
        run.log_metrics({f"{name}.tokens_per_step": one.tokens_per_step for name, one in measured.items()})
        for path in files:
            run.log_artifact(path)
        terminal_table(measured).show()
        return stage.finish(StageResult(STAGE, run.run_id, {"report": str(folder / "report.md")}, {
            "variants": {name: vars(one) for name, one in measured.items()}}), files)


def _trained(config: RunConfig, variants: Mapping[str, Variant]) -> dict[str, list[dict[str, Any]]]:
    """The figures of every training: variant -> one entry for each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    with Progress(STAGE, "trainings", sum(len(variant.seeds) for variant in variants.values())) as progress:
        for name, variant in variants.items():
            for seed in variant.seeds:
                say(STAGE, f"{name}, seed {seed}")
                label = training_name(name, seed)
                result = run_train(variant_config(config, label, variant, seed))
                found.setdefault(name, []).append(result.figures[label])
                progress.advance()
    return found


def variant_config(config: RunConfig, label: str, variant: Variant, seed: int) -> RunConfig:
    """The configuration of a run that trains `variant` alone, under the name `label`."""
    train = config.train.model_copy(update={
        "drafters": {label: variant.heads}, "start": {}, "only": None, "seed": seed, "share": variant.share or config.train.share,
        "epochs": variant.epochs or config.train.epochs})
    return config.model_copy(update={"train": train})


def training_name(variant: str, seed: int) -> str:
    """The name of a training, as a drafter and as a folder."""
    return f"{folder_name(variant)}.seed{seed}"


def summarise(figures: list[dict[str, Any]]) -> Measured:
    """Summarise the figures of one variant's trainings, one for each seed."""
    values = [one["tokens_per_step"] for one in figures]
    tops = [one["top1"] for one in figures]
    spread = T95[min(len(values), len(T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measured(len(values), statistics.fmean(values), spread, tuple(map(statistics.fmean, zip(*tops, strict=True))),
                    figures[0]["response_tokens"], figures[0]["steps"], statistics.fmean(one["seconds"] for one in figures))


T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % by degrees of freedom; with more than ten seeds the value for ten is used, which is a little large."""


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
