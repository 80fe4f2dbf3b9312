"""What a training run tells: the curve and heads inside each checkpoint, the tracker, lines on stderr."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import default_trees
from pipelines.runtime.artifacts import write_text
from pipelines.tracking import metric_logger
from pipelines.train.context import CURVE, HEADS, LOGGED

if TYPE_CHECKING:
    from pipelines.train.context import TrainContext

PROGRESS_SECONDS = 5.0


def save_curve_and_heads(context: TrainContext, folder: Path, metrics: dict[str, Any]) -> None:
    """Put the curve so far and loadable heads beside the engine's state; parameters must be whole."""
    lines = "".join(json.dumps(record) + "\n" for record in context.curve)
    write_text(folder / CURVE, lines)
    provenance = context.settings.provenance | {"training": metrics}
    drafter = context.model.drafter
    save_checkpoint(folder / HEADS, drafter, context.vocabulary.identity, default_trees(drafter.num_heads), provenance)


def read_curve_and_figures(folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The curve that stands in a checkpoint, and the held-out figures of the validation it was made at."""
    curve = [json.loads(line) for line in (folder / CURVE).read_text(encoding="utf-8").splitlines()]
    known = json.loads((folder / HEADS / "provenance.json").read_text(encoding="utf-8"))["training"]
    return curve, {name: value for name, value in known.items() if name not in ("step", "loss")}


def log_curve(context: TrainContext, figures: dict[str, float]) -> None:
    """Send the curve since the last logged step to the tracker; a restarted worker goes on where the log ends."""
    if context.settings.run_id is None or context.settings.tracking_uri is None:
        return
    marker = Path(context.settings.folder) / LOGGED
    done = json.loads(marker.read_text(encoding="utf-8"))["next_step"] if marker.exists() else 0
    logger = metric_logger(context.settings.tracking_uri, context.settings.run_id)
    logger.log_curve([
        (record["step"], {f"train.{name}": value for name, value in record.items() if name not in ("step", "time")})
        for record in context.curve if record["step"] >= done])
    if context.next_step > done:
        logger.log({f"held_out.{name}": value for name, value in figures.items()}, context.next_step)
    write_text(marker, json.dumps({"next_step": max(done, context.next_step)}))


class Progress:
    """Lines on rank 0's stderr, every few seconds: step, loss, speed, time left."""

    def __init__(self, context: TrainContext) -> None:
        self.context, self.shown, self.positions = context, time.monotonic(), 0
        self.began, self.first_step = self.shown, context.next_step

    def after(self, record: dict[str, Any]) -> None:
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
        if self.context.first:
            self.say(f"held out: {figures['tokens_per_step']:.3f} tokens per step, "
                      f"head 0 top-1 {figures['head0_top1']:.3f}")

    def say(self, text: str) -> None:
        # Not print(): Ray Train patches it to log a second copy of every line.
        sys.stderr.write(f"train {self.shop.settings.drafter}: step {self.shop.next_step}/{self.shop.total}, {text}\n")
        sys.stderr.flush()
