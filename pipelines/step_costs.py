"""Timing the two parts of a decoding step on this machine: the base's verification and the drafter's own work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from hydra_core.base import Base
from hydra_core.decoding.accept import accept
from hydra_core.decoding.adaptive import MOST_NODES, AdaptiveSession
from hydra_core.decoding.choose import Chooser
from hydra_core.decoding.propose import HeadSession
from hydra_core.decoding.records import Request
from hydra_core.drafters import AdaptiveDrafter, HeadDrafter
from hydra_core.tree.costs import StepCosts
from hydra_core.tree.topology import Topology, Tree, TreeSet

Job = Callable[[], None]
Key = TypeVar("Key", bound=Hashable)


def verify_seconds(base: Base, batches: Sequence[int], nodes: Iterable[int], context: int, repeats: int,
                   say: Callable[[str], None] = lambda text: None) -> dict[int, dict[int, float]]:
    """Batch size -> nodes -> median seconds of forward, choice, acceptance and commit over `context` committed tokens.

    Raises ValueError if context and nodes do not fit the base.
    """
    sizes = sorted(set(nodes) | {1})
    if context + sizes[-1] > base.context_limit:
        raise ValueError(f"{context} tokens and {sizes[-1]} nodes do not fit a context of {base.context_limit}")
    cache = base.allocate(max(batches), context + sizes[-1])

    def job(batch: int, size: int) -> Job:
        forest = bushy(size).forest
        tokens = torch.full((batch, size), 5, dtype=torch.int64, device=base.device)

        def run() -> None:
            cache.lengths[:batch] = context
            hidden = base.forward(tokens, cache, (0, batch), forest)
            accepted = accept(tokens, forest, base.logits(hidden).argmax(-1))
            cache.commit((0, batch), accepted.path, accepted.counts)

        return run

    jobs = {(batch, size): job(batch, size) for batch in batches for size in sizes}
    measured = medians(jobs, repeats, base.device, say)
    return {batch: {size: measured[batch, size] for size in sizes} for batch in batches}


def draft_seconds(base: Base, drafter: HeadDrafter, trees: Mapping[int, Tree], batches: Sequence[int], context: int,
                  repeats: int, say: Callable[[str], None] = lambda text: None) -> dict[int, dict[int, float]]:
    """Batch size -> depth -> median seconds of drafting with the tree of that depth in `trees`, the prefix layer's
    catching up on the step's tokens included."""
    slots = context + max((tree.depth for tree in trees.values()), default=0) + 1
    width = drafter.vocabulary.width

    def job(batch: int, tree: Tree) -> Job:
        session = HeadSession(drafter, TreeSet({1: tree}), batch, slots)
        roots = torch.full((batch,), 5, dtype=torch.int64, device=base.device)
        positions, counts = [context] * batch, torch.full_like(roots, tree.depth + 1)
        hidden = torch.zeros(batch, tree.depth + 1, width, dtype=base.dtype, device=base.device)
        choosers = [Chooser(Request("greedy", (0,), 1), base.vocab_size)] * batch

        def run() -> None:
            if session.inputs.cache is not None:
                session.inputs.cache.lengths[:] = context
            session.propose(roots, positions, choosers)
            session.observe((0, batch), hidden, counts)

        return run

    jobs = {(batch, depth): job(batch, tree) for batch in batches for depth, tree in trees.items()}
    measured = medians(jobs, repeats, base.device, say)
    return {batch: {depth: measured[batch, depth] for depth in trees} for batch in batches}


def growth_seconds(base: Base, heads: HeadDrafter, batches: Sequence[int], context: int, repeats: int,
                   say: Callable[[str], None] = lambda text: None) -> dict[int, dict[int, float]]:
    """Batch size -> depth -> median seconds of growing a tree with so many heads (0: of copied text alone), the prefix
    layer's catching up on the step's tokens included."""
    free = StepCosts({1: {1: 1.0, MOST_NODES: 1.0}}, {1: {0: 0.0}})  # nothing is left out because it does not pay

    def job(batch: int, depth: int) -> Job:
        drafter = AdaptiveDrafter(heads if depth else None, costs=free)
        session = AdaptiveSession(drafter, batch, context + MOST_NODES)
        session.depths = depth
        text = [5 + place % 7 for place in range(context)]  # repeats itself, so that there is something to copy
        for row in range(batch):
            session.admit(row, text)
        roots = torch.full((batch,), 5, dtype=torch.int64, device=base.device)
        positions, counts = [context] * batch, torch.full_like(roots, depth + 1)
        hidden = torch.zeros(batch, depth + 1, heads.vocabulary.width, dtype=base.dtype, device=base.device)
        choosers = [Chooser(Request("greedy", (0,), 1), base.vocab_size)] * batch

        def run() -> None:
            if depth and session.inputs.cache is not None:
                session.inputs.cache.lengths[:] = context
            session.observe((0, batch), hidden, counts)
            session.propose(roots, positions, choosers)

        return run

    depths = range(heads.num_heads + 1)
    jobs = {(batch, depth): job(batch, depth) for batch in batches for depth in depths}
    measured = medians(jobs, repeats, base.device, say)
    return {batch: {depth: measured[batch, depth] for depth in depths} for batch in batches}


@torch.inference_mode()
def medians(jobs: Mapping[Key, Job], repeats: int, device: torch.device,
            say: Callable[[str], None]) -> dict[Key, float]:
    """Median seconds of each job over `repeats` rounds, forwards and backwards in turn, after one to warm up.

    What drifts on the machine (clock, other work) then touches all of them alike.
    """
    order = list(jobs)
    seconds: dict[Key, list[float]] = {key: [] for key in order}
    for repeat in range(repeats + 1):
        for key in order if repeat % 2 else reversed(order):
            _settle(device)
            began = time.perf_counter()
            jobs[key]()
            _settle(device)
            if repeat:
                seconds[key].append(time.perf_counter() - began)
        say(f"round {repeat} of {repeats}")
    return {key: statistics.median(values) for key, values in seconds.items()}


def bushy(nodes: int) -> Topology:
    """A binary tree, about as deep as trees that pay are. A forward's cost depends on the nodes, not their shape."""
    return Topology((-1, *((node - 1) // 2 for node in range(1, nodes))))


def _settle(device: torch.device) -> None:
    """Wait for a GPU's queue to run dry, so that a clock reads its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
