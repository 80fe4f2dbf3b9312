"""What a training run reports: curve and heads in each checkpoint, metrics in MLflow, lines on stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.storage import as_path
from hydra_core.tree import default_trees
from pipelines.config import RunConfig
from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line
from pipelines.runtime.files import write_text
from pipelines.train.context import CURVE, HEADS, LOGGED

if TYPE_CHECKING:
    from pipelines.tracking import MetricLogger, Run
    from pipelines.train.context import LoopSettings, TrainContext

PROGRESS_SECONDS = 5.0
"""Between two lines of progress."""


def save_curve_and_heads(context: TrainContext, folder: Path, metrics: dict[str, Any]) -> None:
    """Write the curve so far and loadable heads beside the engine's state. ZeRO-3 parameters must be gathered."""
    lines = "".join(json.dumps(record) + "\n" for record in context.curve)
    write_text(folder / CURVE, lines)
    provenance = context.settings.provenance | {"training": metrics}
    drafter = context.model.drafter
    save_checkpoint(folder / HEADS, drafter, context.vocabulary.identity, default_trees(drafter.num_heads), provenance)


def read_curve_and_figures(folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The curve in a checkpoint, and the held-out figures of the validation before it."""
    curve = read_curve(folder / CURVE)
    found = json.loads((folder / HEADS / "provenance.json").read_text(encoding="utf-8"))["training"]
    return curve, {name: value for name, value in found.items() if name not in ("step", "loss")}


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The records of all steps."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tracker_of(context: TrainContext) -> MetricLogger | None:
    """The run's logger, None in a run without tracking. MLflow is imported here, by the one rank that logs."""
    settings = context.settings
    if settings.run_id is None or settings.tracking_uri is None:
        return None
    from pipelines.tracking import metric_logger

    return metric_logger(settings.tracking_uri, settings.run_id)


def watched(settings: LoopSettings) -> AbstractContextManager[None]:
    """Log the load of the first rank's machine inside the block. The other ranks do not import MLflow."""
    import ray.train

    if settings.run_id is None or ray.train.get_context().get_world_rank() > 0:
        return nullcontext()
    from pipelines.tracking import worker_system_metrics

    return worker_system_metrics(RunConfig.model_validate(settings.config), settings.tracking_uri, settings.run_id)


def log_curve(context: TrainContext, figures: dict[str, float]) -> None:
    """Log the steps since the last logged one, and the held-out figures. A restarted worker continues where the log ends.

    A tracker that does not take them costs no training: they are kept, and logged with those of the next validation or, by
    `log_rest`, at the end.
    """
    folder = as_path(context.settings.folder)
    if context.settings.run_id is None:
        return
    marker = _read_marker(folder, context.settings.run_id)
    if figures and context.next_step > marker["next_step"]:
        marker["held_out"][str(context.next_step)] = figures
    try:
        if (logger := tracker_of(context)) is None:
            return
        _log(logger, context.curve, marker)
        marker |= {"next_step": max(marker["next_step"], context.next_step), "held_out": {}}
    except Exception as error:  # a server that is down, a busy database: each kind of store raises its own exceptions
        say(f"train {context.settings.drafter}", f"step {context.next_step}: metrics are not logged yet, training goes on "
            f"({first_line(error)})")
    write_text(folder / LOGGED, json.dumps(marker))


def log_rest(run: Run, folder: Path, curve: Path) -> None:
    """Log what `log_curve` could not: the driver does it when training has ended. `curve`: the file with all steps."""
    marker = _read_marker(folder, run.run_id)
    _log(run, read_curve(curve), marker)


def _log(logger: MetricLogger | Run, curve: Sequence[Mapping[str, Any]], marker: Mapping[str, Any]) -> None:
    # at the time of the step: a point that MLflow has already, though its answer was lost, is the same when it is sent again
    times = {record["step"]: float(record["time"]) for record in curve}
    steps = [record for record in curve if record["step"] >= marker["next_step"]]
    points = [(record["step"], {f"train.{name}": value for name, value in record.items() if name not in ("step", "time")})
              for record in steps]
    moments = [times[record["step"]] for record in steps]
    for step, figures in marker["held_out"].items():
        points.append((int(step), {f"held_out.{name}": value for name, value in figures.items()}))
        moments.append(times.get(int(step) - 1, time.time()))  # of the last step before the validation
    logger.log_curve(points, moments)


def _read_marker(folder: Path, run_id: str) -> dict[str, Any]:
    """The first step that is not logged in the run `run_id`, and the held-out figures, by step, that are not: none where another
    run has those that were (another server, a run that was deleted), so that this one gets the whole curve."""
    marker = folder / LOGGED
    found: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
    if found.get("run_id", run_id) != run_id:
        found = {}
    return {"next_step": 0, "held_out": {}, **found, "run_id": run_id}


class StepLines:
    """Lines on stderr of the first rank, one every few seconds: step, loss, speed, seconds left."""

    def __init__(self, context: TrainContext) -> None:
        self.context, self.shown, self.positions = context, time.monotonic(), 0
        self.began, self.first_step = self.shown, context.next_step

    def after(self, record: dict[str, Any]) -> None:
        """Count the step of `record`, and report it if it is time for a line."""
        self.positions += record["positions"]
        now = time.monotonic()
        if self.context.first and now - self.shown >= PROGRESS_SECONDS:
            done = self.context.next_step - self.first_step
            left = (now - self.began) / done * (self.context.total - self.context.next_step)
            speed = self.positions / (now - self.began)
            self.say(f"loss {record['loss']:.3f}, {speed:.0f} positions/s, "
                     f"{record['padding']:.0%} padding, {left:.0f} s left")
            self.shown = now

    def validated(self, figures: dict[str, float]) -> None:
        """Report held-out figures."""
        if self.context.first:
            self.say(f"held out: {figures['tokens_per_step']:.3f} tokens per step, "
                     f"head 0 top-1 {figures['head0_top1']:.3f}")

    def say(self, text: str) -> None:
        """Write one line. `say` does not print(), which Ray Train patches to log a second copy of every line."""
        settings, context = self.context.settings, self.context
        say(f"train {settings.drafter}", f"step {context.next_step}/{context.total}, {text}")
