"""A search over settings of training: trials drawn from `ablate.space`, of which those that fall behind are stopped early.

    train/DRAFTER.search-DIGEST.trialNNN/   one trial, as the `train` stage writes it; a finished one is not trained again
    train/DRAFTER.search-DIGEST.trialNNN.seedN/   the best trial's settings with another seed
    train/DRAFTER.search-DIGEST.jsonl       what trials were compared by, and who was stopped
    ablate/search.json, search.md, search.png

Trials are trained one after the other: each takes the workers of `train.workers`, as many as there is room for where
`train.workers.count` is a range, so that a second one beside it would find no room. Ray Tune draws the values and decides who
is stopped (pipelines/train/halving.py); its own executor, which would start trials in processes of their own and kill the
stopped ones, is not used. A random search is kept: with trials that are trained one after the other and stopped early, a model
of the space (Optuna's TPE) has few results to learn from (Li et al. 2020, section 4, compare).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.ablate.results import Measured, Tried
from pipelines.ablate.search_report import markdown, plot_trials, terminal_table
from pipelines.ablate.trials import Trial, draw_trials, search_name, searched_drafter, shown, trial_config
from pipelines.ablate.variants import steps_for, summarise, training_ids
from pipelines.config import RunConfig
from pipelines.distill.stage import distilled
from pipelines.rows.schemas import is_in_share
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, finished, stage_folder
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import write_text
from pipelines.tracking import Tracker
from pipelines.train.halving import Halving, read_journal
from pipelines.train.stage import run_train

STAGE = "ablate"


def run_search(config: RunConfig) -> StageResult:
    """Train every trial that is not trained yet, train the best one's settings with other seeds, and write the report.

    Figures: `best`, its settings, tokens per step of its trial and over the other seeds with their spread, what the settings as
    they are reach, and how many trials were stopped. Raises InputError for a setting that cannot be searched, before anything
    is trained; and whatever `train` raises.
    """
    searched_drafter(config)
    tracker = Tracker.open(config)
    data_digest = distilled(config)[1]
    trials = draw_trials(config, data_digest)
    folder, wanted = RunPaths.of(config).stage(STAGE), fingerprint(STAGE, {}, {"distill": data_digest})
    journal = RunPaths.of(config).stage("train", f"{search_name(config, data_digest)}.jsonl")
    tried = _train_trials(config, trials, journal)
    best = best_of(tried)
    seeds = _train_best(config, best.trial)
    report = _report(tried, best, seeds, journal)
    done = finished(folder, wanted)
    if done is not None and (folder / "search.json").exists() and (folder / "search.json").read_text(encoding="utf-8") == report:
        return done
    with stage_folder(config, STAGE, folder, wanted) as stage, tracker.start(STAGE, part="search", fingerprint=wanted) as run:
        files = _write(folder, tried, best, seeds, report)
        run.log_metrics({f"trial{number:03d}.tokens_per_step": one.tokens_per_step for number, one in enumerate(tried)})
        run.log_metrics({"best.tokens_per_step": best.tokens_per_step, "stopped": float(sum(one.stopped for one in tried))}
                        | ({"best.other_seeds": seeds.tokens_per_step} if seeds else {}))
        for path in files:
            run.log_artifact(path)
        terminal_table(tried, best).show()
        say(STAGE, f"best: {best.trial.label}: {shown(best.trial.values)}")
        outputs = {"report": str(folder / "search.md")}
        return stage.finish(StageResult(STAGE, run.run_id, outputs, _figures(tried, best, seeds)), files)


def best_of(tried: list[Tried]) -> Tried:
    """The trial with the most tokens per step among those that were trained to their end, or among all if there is none."""
    return max((one for one in tried if not one.stopped), key=lambda one: one.tokens_per_step, default=max(
        tried, key=lambda one: one.tokens_per_step))


def _train_trials(config: RunConfig, trials: list[Trial], journal: Path) -> list[Tried]:
    ids = training_ids(config)
    most = [_most_rows(trial_config(config, trial, trial.label), ids) for trial in trials]
    least = (config.ablate.least_steps or config.train.validate_every) * config.train.rows_per_step
    found = []
    with Progress(STAGE, "trials", len(trials)) as progress:
        for trial in trials:
            say(STAGE, f"{trial.label}: {shown(trial.values)}")
            halving = Halving(str(journal), trial.label, least, max(most), config.ablate.reduction)
            figures = run_train(trial_config(config, trial, trial.label), halving).figures[trial.label]
            stopped = figures.get("stopped_step")
            found.append(Tried(trial, figures["tokens_per_step"], figures["steps"] if stopped is None else stopped,
                               stopped is not None, figures["seconds"]))
            progress.advance()
    say(STAGE, f"{sum(one.stopped for one in found)} of {len(found)} trials were stopped early, "
               f"{len(read_journal(journal))} comparisons in {journal}")
    return found


def _most_rows(config: RunConfig, ids: tuple[str, ...]) -> int:
    """Rows that a training learns from, over all its passes."""
    rows = sum(is_in_share(one, config.train.share) for one in ids)
    return steps_for(config.train, rows) * config.train.rows_per_step


def _train_best(config: RunConfig, trial: Trial) -> Measured | None:
    """The figures of the same settings with other seeds: the best trial was also the luckiest."""
    found = []
    for seed in range(config.train.seed + 1, config.train.seed + 1 + config.ablate.best_seeds):
        label = f"{trial.label}.seed{seed}"
        say(STAGE, f"{label}: the best trial with another seed")
        found.append(run_train(trial_config(config, trial, label, seed)).figures[label])
    return summarise(found) if found else None


def _figures(tried: list[Tried], best: Tried, seeds: Measured | None) -> dict[str, Any]:
    return {"best": best.figures() | ({"other_seeds": vars(seeds)} if seeds else {}), "as_given": tried[0].figures(),
            "trials": len(tried), "stopped": sum(one.stopped for one in tried)}


def _report(tried: list[Tried], best: Tried, seeds: Measured | None, journal: Path) -> str:
    return json.dumps({**_figures(tried, best, seeds), "trials": [one.figures() for one in tried],
                       "comparisons": read_journal(journal)}, indent=2)


def _write(folder: Path, tried: list[Tried], best: Tried, seeds: Measured | None, report: str) -> list[Path]:
    write_text(folder / "search.json", report)
    write_text(folder / "search.md", markdown(tried, best, seeds))
    plot_trials(folder / "search.png", tried)
    return [folder / "search.json", folder / "search.md", folder / "search.png"]
