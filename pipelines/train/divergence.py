"""When training must stop: a loss or gradients that are not finite, or a loss that explodes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra_core.errors import StoppedError
from hydra_core.storage import is_remote
from pipelines.runtime.files import write_text
from pipelines.train.context import HEADS

STOPPED = "stopped.json"
SUSTAINED, RECENT = 3, 20
"""Number of consecutive steps that must all be bad, and number of steps before them whose median is the usual loss."""


def why_stop(curve: Sequence[Mapping[str, Any]], record: Mapping[str, Any], stop_ratio: float) -> str | None:
    """Why training must stop after a step, given its record and those before it; None if it goes on. The same on every rank."""
    if not math.isfinite(record["loss"]):
        return "the loss is not a number"
    if not math.isfinite(record.get("gradient", 0.0)):
        return "the gradients are not numbers"
    first = curve[0]["loss"] if curve else record["loss"]
    if record["loss"] > stop_ratio * first:
        return f"the loss is {record['loss']:.3g}, over {stop_ratio:g} times the first step's {first:.3g}"
    newest = [*(before["loss"] for before in curve[-(SUSTAINED - 1):]), record["loss"]]
    if len(curve) >= SUSTAINED - 1 + RECENT:
        usual = statistics.median(before["loss"] for before in curve[-(SUSTAINED - 1) - RECENT:-(SUSTAINED - 1)])
        if min(newest) > stop_ratio * usual:  # one bad batch is no explosion
            return f"the loss is {min(newest):.3g} or more in {SUSTAINED} steps, over {stop_ratio:g} times the {usual:.3g} before"
    return None


def why_not_keep(figures: Mapping[str, float]) -> str | None:
    """Why heads with these held-out figures are not saved; None if they are."""
    losses = [value for name, value in figures.items() if name.endswith("_loss")]
    return None if all(map(math.isfinite, losses)) else "the held-out loss is not a number"


def write_stop(folder: Path, why: str, record: Mapping[str, Any]) -> None:
    """Write the reason for the driver. An exception in a worker would make Ray restart it, and it would fail again."""
    write_text(folder / STOPPED, json.dumps({"why": why, "step": record["step"], "lr": record["lr"]}))


def raise_if_stopped(folder: Path, name: str, checkpoint: Any) -> None:
    """Raise StoppedError if the workers have written a reason. `checkpoint`: Ray's last one, which is good, or None."""
    if not (folder / STOPPED).exists():
        return
    found = json.loads((folder / STOPPED).read_text(encoding="utf-8"))
    good = "no checkpoint was made before"
    if checkpoint is not None:
        with checkpoint.as_directory() if is_remote(folder) else nullcontext(checkpoint.path) as source:
            made = json.loads((Path(source) / HEADS / "provenance.json").read_text(encoding="utf-8"))
        good = f"the last good checkpoint, after {made['training']['step']} steps, is {checkpoint.path}/{HEADS}"
    raise StoppedError(f"train.drafters.{name}: {found['why']} at step {found['step']} (lr {found['lr']:.2e}): {good}; lower "
                       "train.lr or raise train.warmup_steps, under another name")
