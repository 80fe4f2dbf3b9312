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
    from pipelines.train.context import Workshop

PROGRESS_SECONDS = 5.0


def save_curve_and_heads(shop: Workshop, folder: Path, metrics: dict[str, Any]) -> None:
    """Put the curve so far and loadable heads beside the engine's state; parameters must be whole."""
    lines = "".join(json.dumps(record) + "\n" for record in shop.curve)
    write_text(folder / CURVE, lines)
    provenance = shop.settings.provenance | {"training": metrics}
    drafter = shop.model.drafter
    save_checkpoint(folder / HEADS, drafter, shop.vocabulary.identity, default_trees(drafter.num_heads), provenance)


def read_curve_and_figures(folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The curve that stands in a checkpoint, and the held-out figures of the validation it was made at."""
    curve = [json.loads(line) for line in (folder / CURVE).read_text(encoding="utf-8").splitlines()]
    known = json.loads((folder / HEADS / "provenance.json").read_text(encoding="utf-8"))["training"]
    return curve, {name: value for name, value in known.items() if name not in ("step", "loss")}


def log_curve(shop: Workshop, figures: dict[str, float]) -> None:
    """Send the curve since the last logged step to the tracker; a restarted worker goes on where the log ends."""
    if shop.settings.run_id is None or shop.settings.tracking_uri is None:
        return
    marker = Path(shop.settings.folder) / LOGGED
    done = json.loads(marker.read_text(encoding="utf-8"))["next_step"] if marker.exists() else 0
    logger = metric_logger(shop.settings.tracking_uri, shop.settings.run_id)
    logger.log_curve([
        (record["step"], {f"train.{name}": value for name, value in record.items() if name not in ("step", "time")})
        for record in shop.curve if record["step"] >= done])
    if shop.next_step > done:
        logger.log({f"held_out.{name}": value for name, value in figures.items()}, shop.next_step)
    write_text(marker, json.dumps({"next_step": max(done, shop.next_step)}))


class Progress:
    """Lines on rank 0's stderr, every few seconds: step, loss, speed, time left."""

    def __init__(self, shop: Workshop) -> None:
        self.shop, self.shown, self.positions = shop, time.monotonic(), 0
        self.began, self.first_step = self.shown, shop.next_step

    def after(self, record: dict[str, Any]) -> None:
        self.positions += record["positions"]
        now = time.monotonic()
        if self.shop.first and now - self.shown >= PROGRESS_SECONDS:
            done = self.shop.next_step - self.first_step
            left = (now - self.began) / done * (self.shop.total - self.shop.next_step)
            speed = self.positions / (now - self.began)
            self.say(f"loss {record['loss']:.3f}, {speed:.0f} positions/s, "
                      f"{record['padding']:.0%} padding, {left:.0f} s left")
            self.shown = now

    def validated(self, figures: dict[str, float]) -> None:
        if self.shop.first:
            self.say(f"held out: {figures['tokens_per_step']:.3f} tokens per step, "
                      f"head 0 top-1 {figures['head0_top1']:.3f}")

    def say(self, text: str) -> None:
        # Not print(): Ray Train patches it to log a second copy of every line.
        sys.stderr.write(f"train {self.shop.settings.drafter}: step {self.shop.next_step}/{self.shop.total}, {text}\n")
        sys.stderr.flush()
