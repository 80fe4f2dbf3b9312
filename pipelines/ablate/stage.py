"""The `ablate` stage: variants of training on the same rows, each with several seeds, compared by question.

    train/VARIANT.seedN/     one training, as the `train` stage writes it; a finished one is not trained again
    ablate/report.json, report.md, ablations.png
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from pipelines.ablate.report import markdown, plot_studies, terminal_table
from pipelines.ablate.results import Measured
from pipelines.ablate.search import run_search
from pipelines.ablate.variants import summarise, training_name, variant_config
from pipelines.config import RunConfig, Variant
from pipelines.distill.stage import distilled
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, stage_folder
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import write_text
from pipelines.tracking import Tracker
from pipelines.train.stage import run_train

STAGE = "ablate"


def run_ablate(config: RunConfig) -> StageResult:
    """Train every variant that is not trained yet, then write the report; with `ablate.space` search it instead.

    Raises InputError when there are no variants, and whatever `train` raises.
    """
    if config.ablate.space:
        return run_search(config)
    variants = config.ablate.variants
    if not variants:
        raise InputError("ablate.variants: is empty: name variants, as jobs/configs/ablations/ does, or give ablate.space")
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
        best = max(measured, key=lambda name: measured[name].tokens_per_step)
        run.describe(f"{best}: {measured[best].tokens_per_step:.3f} tokens per step, the most of {len(measured)} variants",
                     markdown(_studies(config), measured), ("ablations.png",))
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
