"""What decoding steps take on this machine: measured once for a base and its weight format, and kept in the cache.

    CACHE/costs/verify-KEY.json   the base's forward, by rows and nodes
    CACHE/costs/draft-KEY.json    the drafter's own work, by rows and depth, for heads of one shape

KEY is a digest of the machine's fingerprint and of what was timed: another processor, thread count, torch or weight
format measures anew.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hydra_core.base import Base
from hydra_core.decoding.adaptive import MOST_NODES
from hydra_core.drafters import HeadDrafter
from hydra_core.tree.costs import StepCosts
from pipelines.stage import write_text
from pipelines.step_costs import growth_seconds, verify_seconds

BATCHES = (1, 4, 16)
NODES = (1, 2, 3, 4, 6, 8, 9, 12, 16, 24, 32, MOST_NODES)
CONTEXT = 256
REPEATS = 5

Table = dict[int, dict[int, float]]


def fingerprint_of_machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on, readable."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.machine()}


def machine_costs(base: Base, cache: Path, heads: HeadDrafter | None = None, batches: Sequence[int] = BATCHES,
                  context: int = CONTEXT) -> StepCosts:
    """Costs of this machine, from the cache or timed now (seconds, a minute for a large base).

    `batches`: rows to time; `context`: committed tokens of a row while timing.
    """
    most = min(MOST_NODES, base.context_limit // 2)
    room, sizes = min(context, base.context_limit - most), [nodes for nodes in NODES if nodes <= most]
    timed = {"base": str(base.identity), "batches": list(batches), "context": room}
    verify = _kept(cache, "verify", base, timed | {"nodes": sizes}, partial(
        verify_seconds, base, batches, sizes, room, REPEATS))
    if heads is None:
        return StepCosts(verify, {1: {0: 0.02 * verify[min(verify)][1]}})
    shape = heads.config.model_dump(mode="json") | {"draft_vocab": len(heads.draft_vocab)}
    return StepCosts(verify, _kept(cache, "draft", base, timed | {"heads": shape}, partial(
        growth_seconds, base, heads, batches, room, REPEATS)))


def _kept(cache: Path, what: str, base: Base, timed: dict[str, Any], measure: Callable[[], Table]) -> Table:
    machine = fingerprint_of_machine(base.device)
    key = hashlib.sha256(json.dumps([machine, timed], sort_keys=True).encode()).hexdigest()[:16]
    path = cache / "costs" / f"{what}-{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # two processes that measure at once would time each other
        if (found := _read(path)) is not None:
            return found
        print(f"costs: timing {what} steps on this machine, once", file=sys.stderr, flush=True)
        table = measure()
        write_text(path, json.dumps({"machine": machine, "timed": timed, "seconds": table}, indent=2))
    return table


def _read(path: Path) -> Table | None:
    """A table that was kept, or None where there is none that can be read."""
    try:
        seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        return {int(batch): {int(at): float(value) for at, value in points.items()} for batch, points in seconds.items()}
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "cpu"
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return " ".join(fields.get(name, "") for name in ("model name", "model", "stepping")).strip() or "cpu"
