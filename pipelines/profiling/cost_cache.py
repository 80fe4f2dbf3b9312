"""What decoding steps take on this machine: measured once for a base and its weight format, and kept in the cache.

    CACHE/costs/verify-KEY.json   the base's forward, by context, rows and nodes
    CACHE/costs/draft-KEY.json    the drafter's own work, by rows and depth, for heads of one shape
    CACHE/costs/curves-KEY.json   the base's forward up to its longest context, for people to look at

KEY is a digest of the machine's fingerprint and of what was timed: another processor, thread count, torch or weight
format measures anew. Whoever needs a step's seconds asks here, so that nothing is timed twice.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from hydra_core.base import Base
from hydra_core.heads import HeadDrafter
from hydra_core.kernels.library import sources_digest
from hydra_core.tree.costs import StepCosts, unmeasured_costs
from hydra_core.tree.draft_tree import DraftTree
from pipelines.config import TreeSection
from pipelines.profiling.step_timing import Group, Point, draft_seconds, that_fit, verify_seconds
from pipelines.runtime.artifacts import write_text

SCHEMA = 8
DEFAULTS = TreeSection()
TOKENS_AT_ONCE = {"cpu": 512}
"""Rows times nodes that are worth timing, by device: trees that cost more never paid."""
FAR_ROWS = 64
"""Rows that are timed over long contexts at most; more follow from these."""
CURVE_CONTEXTS, CURVE_BATCHES, CURVE_NODES, CURVE_REPEATS = (256, 1024, 2048, 4096), (1, 4, 16), (1, 8, 16, 32), 3

Say = Callable[[str], None]
Times = Mapping[Any, float]
"""Seconds by what was timed, a tuple of whole numbers."""


def fingerprint_of_machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on, readable."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.machine()}


def machine_costs(base: Base, cache: Path, heads: HeadDrafter | None = None, settings: TreeSection = DEFAULTS,
                  trees: Mapping[int, DraftTree] | None = None, timing: bool = True) -> StepCosts:
    """Costs of this machine, from the cache or timed now (less than a minute for a small base).

    `settings`: batch sizes, node counts, contexts and repeats; `trees`: the fixed tree of each depth that `heads` will
    fill; None where trees are grown. Sizes that do not fit the base's context or the memory are left out. Raises
    NotTimed where `timing` is false and nothing is kept.
    """
    groups = groups_to_time(settings, base.context_limit, TOKENS_AT_ONCE.get(base.device.type))
    context, smallest, nodes = groups[0]
    verify = _kept(cache, "verify", base, {"groups": groups, "repeats": settings.repeats}, timing, lambda say: verify_seconds(
        base, that_fit(base, groups) or [(context, smallest, count) for count in nodes], settings.repeats, say))
    far = {at: _surface(verify, at) for at in sorted({at for at, *_ in verify})}
    near = far.pop(context)
    if heads is None or trees == {}:
        return StepCosts(near, {1: {0: 0.02 * near[min(near)][1]}}, context, far)
    shape = heads.config.model_dump(mode="json") | {"draft_vocab": len(heads.draft_vocab)}
    fixed = None if trees is None else {depth: tree.paths for depth, tree in trees.items()}
    batches = sorted(near)
    timed = {"heads": shape, "trees": fixed, "batches": batches, "context": context, "repeats": settings.repeats}
    draft = _kept(cache, "draft", base, timed, timing, lambda say: draft_seconds(
        base, heads, trees, batches, context, settings.repeats, say))
    return StepCosts(near, _table(draft), context, far)


def known_costs(base: Base, cache: Path, heads: HeadDrafter | None = None) -> StepCosts:
    """Costs as `machine_costs` has kept them, else a guess: for a machine at work, which could only be timed wrongly."""
    try:
        return machine_costs(base, cache, heads, timing=False)
    except NotTimed:
        _say("not timed on this machine yet, which is at work: trees are grown by a guess until the next start")
        return unmeasured_costs()


def step_curves(base: Base, cache: Path) -> dict[Point, float]:
    """Seconds of the base's part of a step from short contexts to the longest that the base holds, as memory allows."""
    nodes = tuple(count for count in CURVE_NODES if 2 * count <= base.context_limit) or (1,)
    longest = base.context_limit - nodes[-1]
    groups = [(context, batch, nodes) for context in sorted({*(at for at in CURVE_CONTEXTS if at < longest), longest})
              for batch in CURVE_BATCHES]
    return dict(_kept(cache, "curves", base, {"groups": groups, "repeats": CURVE_REPEATS}, True, lambda say: verify_seconds(
        base, that_fit(base, groups), CURVE_REPEATS, say)))


def groups_to_time(settings: TreeSection, limit: int, tokens: int | None) -> list[Group]:
    """What `machine_costs` times of a base that holds `limit` tokens: all sizes at one context, then a few over longer ones.

    `tokens`: rows times nodes at most, but for the two smallest trees of a batch size; None: any.
    """
    nodes = sorted({1, *(count for count in settings.node_counts if count < limit)})
    room = limit - nodes[-1]
    context = min(settings.context, room)
    groups: list[Group] = []
    for batch in sorted(set(settings.batch_sizes)):
        worth = [count for count in nodes if tokens is None or batch * count <= tokens]
        groups.append((context, batch, tuple(worth if len(worth) > 1 else nodes[:2])))
    for far in sorted({min(far, room) for far in settings.far_contexts}):
        if far >= 2 * context:
            groups += [(far, batch, _few(sizes)) for at, batch, sizes in groups if at == context and batch <= FAR_ROWS]
    return groups


def _few(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The first, a middle one and the last."""
    return tuple(sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}))


def _surface(times: Times, context: int) -> dict[int, dict[int, float]]:
    return _table({(batch, nodes): seconds for (at, batch, nodes), seconds in times.items() if at == context})


def _table(times: Times) -> dict[int, dict[int, float]]:
    """(Row, column) -> value as row -> column -> value."""
    table: dict[int, dict[int, float]] = {}
    for (row, column), value in sorted(times.items()):
        table.setdefault(row, {})[column] = value
    return table


class NotTimed(Exception):
    """No costs are kept, and this is no time to take them."""


def _kept(cache: Path, what: str, base: Base, timed: dict[str, Any], timing: bool, measure: Callable[[Say], Times]) -> Times:
    native = getattr(base.decoder, "native", None) is not None
    machine = fingerprint_of_machine(base.device) | {"native": sources_digest() if native else None}
    timed = {"schema": SCHEMA, "base": str(base.identity)} | timed
    key = hashlib.sha256(json.dumps([machine, timed], sort_keys=True).encode()).hexdigest()[:16]
    path = cache / "costs" / f"{what}-{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # two processes that measure at once would time each other
        if (found := _read(path)) is not None:
            return found
        if not timing:
            raise NotTimed
        _say(f"timing {what} steps on this machine, once")
        times = measure(lambda text: _say(f"{what}: {text}"))
        seconds = [[*point, value] for point, value in times.items()]
        write_text(path, json.dumps({"machine": machine, "timed": timed, "seconds": seconds}))
    return times


def _say(text: str) -> None:
    print(f"costs: {text}", file=sys.stderr, flush=True)


def _read(path: Path) -> Times | None:
    """Times that were kept, or None where there are none that can be read."""
    try:
        seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
        return {tuple(int(at) for at in point): float(value) for *point, value in seconds}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "cpu"
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return " ".join(fields.get(name, "") for name in ("model name", "model", "stepping")).strip() or "cpu"
