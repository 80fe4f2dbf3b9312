"""Stopping a training whose held-out tokens per step are behind those of other trials: asynchronous successive halving (ASHA).

Source: Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning (arXiv 1810.05934). The rule is Ray Tune's
`AsyncHyperBandScheduler`. Tune's own way of stopping kills the process that trains; here the first rank asks after a
validation, and all ranks end after that step's checkpoint: the training has exactly so many steps, with heads, curve and
manifest like any other.

What was measured and decided stands in a journal, which is read anew at each question: a trial that was killed gets the same
answer again, and trials that had ended before count as they did.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from hydra_core.storage import as_path
from pipelines.runtime.console import say
from pipelines.runtime.files import append_line, write_text

if TYPE_CHECKING:
    from pipelines.train.context import TrainContext

HALTED = "halted.json"
VALUE, ROWS = "tokens_per_step", "rows"


@dataclass(frozen=True)
class Halving:
    """How trials are compared. `journal`: the file; `trial`: name of this one; `least_rows`: rows that every trial learns from
    (rows of all passes), before it may be stopped; `most_rows`: those of the longest trial; `reduction`: one trial of so many
    goes on at each rung, and a rung has so many times the rows of the one before."""

    journal: str
    trial: str
    least_rows: int
    most_rows: int
    reduction: float


def goes_on(halving: Halving, step: int, rows: int, value: float) -> bool:
    """Whether the trial goes on, given its tokens per step after `rows` rows; the question and the answer are recorded."""
    journal = as_path(halving.journal)
    entries = read_journal(journal)
    known = next((entry for entry in entries if (entry["trial"], entry["step"]) == (halving.trial, step)), None)
    if known is not None:
        return bool(known["goes_on"])
    answer = _answer(entries, halving, rows, value)
    append_line(journal, json.dumps({"trial": halving.trial, "step": step, ROWS: rows, VALUE: value, "goes_on": answer}).encode())
    return answer


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """The entries so far; a line that a kill has cut off is none."""
    found = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _answer(entries: list[dict[str, Any]], halving: Halving, rows: int, value: float) -> bool:
    """The scheduler's decision after what the journal tells it."""
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    scheduler = AsyncHyperBandScheduler(ROWS, VALUE, "max", max(halving.most_rows, halving.least_rows), halving.least_rows,
                                        halving.reduction, stop_last_trials=False)
    known: dict[str, Any] = {}

    def decision(trial: str, at: int, found: float) -> str:
        if trial not in known:
            known[trial] = cast(Any, SimpleNamespace(trial_id=trial))
            scheduler.on_trial_add(cast(Any, None), known[trial])
        return scheduler.on_trial_result(cast(Any, None), known[trial], {ROWS: at, VALUE: found})

    for entry in entries:
        decision(entry["trial"], entry[ROWS], entry[VALUE])
    return decision(halving.trial, rows, value) != TrialScheduler.STOP


def must_halt(context: TrainContext) -> bool:
    """Whether the training ends after the step that was validated last; the same on every rank. The step is then in `HALTED`."""
    settings, step = context.settings, context.next_step
    if settings.halving is None or context.validated is None or step >= context.total:
        return False
    halts = torch.zeros(1, dtype=torch.int32, device=context.device)
    if context.first:
        halving = Halving(**settings.halving)
        if not goes_on(halving, step, step * context.train.rows_per_step, context.validated):
            write_text(as_path(settings.folder) / HALTED, json.dumps({"step": step, VALUE: context.validated}))
            say(f"train {settings.drafter}", f"stopped at step {step} of {context.total}: {context.validated:.3f} tokens per "
                                             "step are behind the other trials")
            halts.fill_(1)
    dist.broadcast(halts, 0)
    return bool(halts.item())


def halted_step(folder: Path) -> int | None:
    """The step at which the training in `folder` was stopped; None for one that has ended by itself."""
    path = folder / HALTED
    return int(json.loads(path.read_text(encoding="utf-8"))["step"]) if path.exists() else None
