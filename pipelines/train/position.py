"""Where a training stands: the optimizer's state and the next step, as a checkpoint holds them for any number of workers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from pipelines.runtime.files import write_text
from pipelines.train.context import TrainContext
from pipelines.train.optimizer_state import load_state, save_state

POSITION, SCHEMA_VERSION = "position.json", 1
EARLIER = "state"
"""Folder of DeepSpeed's own checkpoint inside those of earlier versions."""


def save_position(context: TrainContext, folder: Path) -> None:
    """Write this rank's part of the optimizer's state; the first rank writes the next step besides."""
    save_state(context.engine, folder, context.group.rank)
    if context.first:
        write_text(folder / POSITION, json.dumps({
            "schema_version": SCHEMA_VERSION, "next_step": context.next_step, "lanes": context.lanes,
            "workers": context.group.world_size}))


def load_position(context: TrainContext, folder: Path) -> dict[str, Any]:
    """Read the optimizer's state from a checkpoint; returns its `next_step`, and `lanes` if an earlier version knew of them.

    Every rank calls it. Raises InputError for a checkpoint of an earlier version that another number of workers wrote.
    """
    if not (folder / POSITION).exists():
        return _load_earlier(context, folder)
    found: dict[str, Any] = json.loads((folder / POSITION).read_text(encoding="utf-8"))
    if found["schema_version"] != SCHEMA_VERSION:
        raise InputError(f"{folder / POSITION}: schema_version {found['schema_version']} is not {SCHEMA_VERSION}: continue with "
                         "the version of hydra-heads that wrote it")
    load_state(context.engine, folder, context.group.rank)
    return found


def _load_earlier(context: TrainContext, folder: Path) -> dict[str, Any]:
    """Read DeepSpeed's own checkpoint, which belongs to the number of ranks that wrote it."""
    parts = {found[1] for path in (folder / EARLIER).glob("*_optim_states.pt")
             if (found := re.search(r"zero_pp_rank_(\d+)_", path.name))}
    if parts and len(parts) != context.group.world_size:
        raise InputError(f"{folder}: an earlier version made this checkpoint with {len(parts)} workers, which alone can continue "
                         f"it: set train.workers.count={len(parts)}, or delete {folder.parent.parent} to train from the start")
    _, client = context.engine.load_checkpoint(str(folder), tag=EARLIER)
    return dict(client)
