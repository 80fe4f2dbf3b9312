"""Seconds of decoding steps on this machine: measured once for a base and its weight format, then read from the cache.

    CACHE/costs/verify-KEY.json   the base's forward, by context, batch size and nodes
    CACHE/costs/draft-KEY.json    the drafter's own work, by batch size and depth, for heads of one shape
    CACHE/costs/curves-KEY.json   the base's forward up to its longest context, for reports

KEY is a digest of the machine's fingerprint and of the points that were timed: with another processor, thread count, torch
version or weight format the steps are measured again. Every module that needs the seconds of a step calls this one, so that
nothing is timed twice.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hydra_core.base import Base
from hydra_core.files import file_lock
from hydra_core.heads import HeadDrafter
from hydra_core.kernels.library import sources_digest
from hydra_core.tree.costs import StepCosts, unmeasured_costs
from hydra_core.tree.draft_tree import DraftTree
from pipelines.config import TreeSection
from pipelines.profiling.step_timing import Group, Point, draft_seconds, that_fit, verify_seconds
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import write_text
from pipelines.runtime.hardware import this_hardware

SCHEMA = 8
DEFAULTS = TreeSection.model_validate({})
ONE_SEQUENCE = TreeSection.model_validate({"batch_sizes": [1]})
TOKENS_AT_ONCE = {"cpu": 512}
"""Largest product of batch size and nodes that is timed, by device: larger trees cost more than they gain."""
FAR_ROWS = 64
"""Largest batch size that is timed over long contexts; times of larger ones are extrapolated."""
CURVE_CONTEXTS, CURVE_BATCHES, CURVE_NODES, CURVE_REPEATS = (256, 1024, 2048, 4096), (1, 4, 16), (1, 8, 16, 32), 3

Times = Mapping[Any, float]
"""Seconds of each timed point, which is a tuple of integers."""


def fingerprint_of_machine(device: torch.device) -> dict[str, Any]:
    """The properties of this machine that a measured time depends on, in readable form."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.machine(),
            "hardware": this_hardware().digest}


def machine_costs(base: Base, cache: Path, heads: HeadDrafter | None = None, settings: TreeSection = DEFAULTS,
                  trees: Mapping[int, DraftTree] | None = None, timing: bool = True) -> StepCosts:
    """Step costs on this machine: read from the cache, or measured now (less than a minute for a small base).

    `settings`: batch sizes, node counts, contexts and repeats; `trees`: the fixed tree of each depth that `heads` fill, None
    for dynamic trees. Sizes that do not fit the base's context or the memory are left out. Raises NotTimed when `timing` is
    false and the cache has no costs.
    """
    groups = groups_to_time(settings, base.context_limit, TOKENS_AT_ONCE.get(base.device.type))
    context, smallest, nodes = groups[0]
    wanted = {"groups": groups, "repeats": settings.repeats}
    verify = _cached(cache, "verify", base, wanted, timing, lambda advance: verify_seconds(
        base, that_fit(base, groups) or [(context, smallest, count) for count in nodes], settings.repeats, advance))
    far = {at: _surface(verify, at) for at in sorted({at for at, *_ in verify})}
    near = far.pop(context)
    if heads is None or trees == {}:
        return StepCosts(near, {1: {0: 0.02 * near[min(near)][1]}}, context, far)
    shape = heads.config.model_dump(mode="json") | {"draft_vocab": len(heads.draft_vocab)}
    fixed = None if trees is None else {depth: tree.paths for depth, tree in trees.items()}
    batches = sorted(near)
    timed = {"heads": shape, "trees": fixed, "batches": batches, "context": context, "repeats": settings.repeats}
    draft = _cached(cache, "draft", base, timed, timing, lambda advance: draft_seconds(
        base, heads, trees, batches, context, settings.repeats, advance))
    return StepCosts(near, _table(draft), context, far)


def costs_of_one(base: Base, cache: Path, heads: HeadDrafter | None = None) -> StepCosts:
    """Step costs for one sequence at a time: those of all batch sizes where the cache has them, else a few seconds' timing."""
    try:
        return machine_costs(base, cache, heads, timing=False)
    except NotTimed:
        return machine_costs(base, cache, heads, ONE_SEQUENCE)


def known_costs(base: Base, cache: Path, heads: HeadDrafter | None = None) -> StepCosts:
    """Step costs from the cache, else estimates: for a machine that is busy, where measured times would be wrong."""
    try:
        return machine_costs(base, cache, heads, timing=False)
    except NotTimed:
        say("costs", "steps are not timed on this machine yet, and it is busy: dynamic trees use estimates until the next start")
        return unmeasured_costs()


def step_curves(base: Base, cache: Path) -> dict[Point, float]:
    """Seconds of the base's part of a step, from short contexts to the longest that the base and the memory hold."""
    nodes = tuple(count for count in CURVE_NODES if 2 * count <= base.context_limit) or (1,)
    longest = base.context_limit - nodes[-1]
    groups = [(context, batch, nodes) for context in sorted({*(at for at in CURVE_CONTEXTS if at < longest), longest})
              for batch in CURVE_BATCHES]
    timed = {"groups": groups, "repeats": CURVE_REPEATS}
    return dict(_cached(cache, "curves", base, timed, True, lambda advance: verify_seconds(
        base, that_fit(base, groups), CURVE_REPEATS, advance)))


def groups_to_time(settings: TreeSection, limit: int, tokens: int | None) -> list[Group]:
    """The points that `machine_costs` times for a base with a context of `limit` tokens: all sizes at one context, then a few
    at longer ones.

    `tokens`: largest product of batch size and nodes, which the two smallest trees of a batch size may exceed; None: no limit.
    """
    nodes = sorted({1, *(count for count in settings.node_counts if count < limit)})
    room = limit - nodes[-1]
    context = min(settings.context, room)
    groups: list[Group] = []
    for batch in sorted(set(settings.batch_sizes)):
        timed = [count for count in nodes if tokens is None or batch * count <= tokens]
        groups.append((context, batch, tuple(timed if len(timed) > 1 else nodes[:2])))
    for far in sorted({min(far, room) for far in settings.far_contexts}):
        if far >= 2 * context:
            groups += [(far, batch, _few(sizes)) for at, batch, sizes in groups if at == context and batch <= FAR_ROWS]
    return groups


def _few(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The first, the middle and the last."""
    return tuple(sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}))


def _surface(times: Times, context: int) -> dict[int, dict[int, float]]:
    return _table({(batch, nodes): seconds for (at, batch, nodes), seconds in times.items() if at == context})


def _table(times: Times) -> dict[int, dict[int, float]]:
    """Nest {(row, column): value} as {row: {column: value}}."""
    table: dict[int, dict[int, float]] = {}
    for (row, column), value in sorted(times.items()):
        table.setdefault(row, {})[column] = value
    return table


class NotTimed(Exception):
    """The cache has no costs, and the caller does not want them measured now."""


def _cached(cache: Path, what: str, base: Base, timed: dict[str, Any], timing: bool,
            measure: Callable[[Callable[[], None]], Times]) -> Times:
    """Times from the cache, else those of `measure`, which calls its argument after every round."""
    native = getattr(base.decoder, "native", None) is not None
    machine = fingerprint_of_machine(base.device) | {"native": sources_digest() if native else None}
    timed = {"schema": SCHEMA, "base": str(base.identity), **timed}
    key = hashlib.sha256(json.dumps([machine, timed], sort_keys=True).encode()).hexdigest()[:16]
    path = cache / "costs" / f"{what}-{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(f"{path}.lock"):  # of two processes that measure at the same time, each would slow the other
        if (found := _read(path)) is not None:
            return found
        if not timing:
            raise NotTimed
        say("costs", f"timing {what} steps on this machine, once")
        with Progress("costs", f"rounds of {what} steps", int(timed["repeats"]) + 1) as progress:
            times = measure(progress.advance)
        seconds = [[*point, value] for point, value in times.items()]
        write_text(path, json.dumps({"machine": machine, "timed": timed, "seconds": seconds}))
    return times


def _read(path: Path) -> Times | None:
    """The times in a file of the cache, or None if there is no readable one."""
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
