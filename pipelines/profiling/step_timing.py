"""Timing the two parts of a decoding step on this machine: the base's verification and the drafter's own work."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from hydra_core.base import Base
from hydra_core.base.graphs import recorder_for, step_forward
from hydra_core.decoding.memory import free_bytes, workspace_bytes
from hydra_core.decoding.verify import accept
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter
from hydra_core.proposers.dynamic import MOST_NODES, DynamicTreeProposer
from hydra_core.proposers.heads import HeadProposer
from hydra_core.sampling.request import Request
from hydra_core.sampling.sampler import Sampler
from hydra_core.tree.batch import TreeBatch, chain
from hydra_core.tree.costs import StepCosts
from hydra_core.tree.draft_tree import DraftTree, TreeSet

Job = Callable[[], None]
Key = TypeVar("Key", bound=Hashable)
Point = tuple[int, int, int]
"""Committed tokens of a sequence, batch size, nodes of a sequence."""
Group = tuple[int, int, tuple[int, ...]]
"""The points of one context and batch size: as `Point`, with several node counts."""
SHARE_OF_MEMORY = 0.5
"""Largest share of the free memory that timing takes."""
ENOUGH = 0.5
"""Seconds in all after which a job is timed no more: what disturbs a measurement is short beside it."""


def that_fit(base: Base, groups: Iterable[Group]) -> list[Point]:
    """The points of those groups that fit the base's context and half of the free memory, short contexts first.

    Each batch size has one cache, as long as its longest point. A group is timed as a whole or not at all, since one point
    alone does not tell the cost of a node.
    """
    free, slots, points = SHARE_OF_MEMORY * free_bytes(base.device), dict[int, int](), list[Point]()
    for context, batch, nodes in sorted(groups):
        longest = context + max(nodes)
        wanted = slots | {batch: max(slots.get(batch, 0), longest)}
        needed = sum(base.decoder.cache_bytes(rows, size) for rows, size in wanted.items())
        if longest <= base.context_limit and needed + workspace_bytes(base, batch, longest, max(nodes)) <= free:
            slots = wanted
            points += [(context, batch, count) for count in nodes]
    return points


def verify_seconds(base: Base, points: Sequence[Point], repeats: int,
                   advance: Callable[[], None] = lambda: None) -> dict[Point, float]:
    """Seconds of forward, argmax, acceptance and commit at each point; `advance` is called after each round.

    Raises ValueError for a point that does not fit the base.
    """
    for context, _, nodes in points:
        if context + nodes > base.context_limit:
            raise ValueError(f"{context} tokens and {nodes} nodes do not fit a context of {base.context_limit}")
    caches = {batch: base.allocate(batch, max(context + nodes for context, rows, nodes in points if rows == batch))
              for batch in {batch for _, batch, _ in points}}
    forwards = {batch: step_forward(base, cache, max(nodes for _, rows, nodes in points if rows == batch))
                for batch, cache in caches.items()}

    def job(context: int, batch: int, nodes: int) -> Job:
        trees, cache = bushy(nodes), caches[batch]
        tokens = torch.full((batch, nodes), 5, dtype=torch.int64, device=base.device)

        def run() -> None:
            cache.lengths[:] = context
            hidden = forwards[batch](tokens, trees, context, None)
            accepted = accept(tokens, trees, base.argmax(hidden))
            cache.commit((0, batch), accepted.path, accepted.counts)

        return run

    return typical({point: job(*point) for point in points}, repeats, base.device, advance)


def draft_seconds(base: Base, heads: HeadDrafter, trees: Mapping[int, DraftTree] | None, batches: Sequence[int], context: int,
                  repeats: int, advance: Callable[[], None] = lambda: None) -> dict[tuple[int, int], float]:
    """(Batch size, depth) -> seconds of drafting, including the forward of the prefix layer over the step's tokens.

    Between two drafts the base reads its weights once, as it does while decoding: heads that are still in the processor's
    cache would seem cheaper than they are. `trees`: the fixed tree of each depth; None: dynamic trees of so many heads, where 0
    heads draft copied text alone.
    """
    def job(batch: int, depth: int) -> Job:
        proposer = _growing(base, heads, batch, depth, context) if trees is None else HeadProposer(
            heads, TreeSet({1: trees[depth]}), batch, context + MOST_NODES, recorder=recorder_for(base.device))
        inputs = proposer.inputs if depth else None
        roots = torch.full((batch,), 5, dtype=torch.int64, device=base.device)
        positions, counts = [context] * batch, torch.full_like(roots, depth + 1)
        hidden = torch.zeros(batch, depth + 1, heads.vocabulary.width, dtype=base.dtype, device=base.device)
        samplers = [Sampler(Request("greedy", (0,), 1), base.vocab_size)] * batch

        def run() -> None:
            if inputs is not None and inputs.cache is not None:
                inputs.cache.lengths[:] = context
            proposer.commit((0, batch), hidden, counts)
            proposer.propose(roots, positions, samplers)

        return run

    depths = range(heads.num_heads + 1) if trees is None else trees
    cache, token = base.allocate(1, 2), torch.full((1, 1), 5, dtype=torch.int64, device=base.device)
    return typical({(batch, depth): job(batch, depth) for batch in batches for depth in depths}, repeats, base.device, advance,
                   before=lambda: base.forward(token, cache, (0, 1), chain(1)))


def _growing(base: Base, heads: HeadDrafter, batch: int, depth: int, context: int) -> DynamicTreeProposer:
    """A proposer that drafts dynamic trees with `depth` heads whatever they cost, for a text that repeats itself, so that there
    is something to copy."""
    free = StepCosts({1: {1: 1.0, MOST_NODES: 1.0}}, {1: {0: 0.0}})
    proposer = DynamicTreeProposer(AdaptiveDrafter(heads if depth else None, costs=free), batch, context + MOST_NODES,
                              device=base.device)
    proposer.depths = depth
    for row in range(batch):
        proposer.admit(row, [5 + place % 7 for place in range(context)])
    return proposer


@torch.inference_mode()
def typical(jobs: Mapping[Key, Job], repeats: int, device: torch.device,
            advance: Callable[[], None], before: Callable[[], object] = lambda: None) -> dict[Key, float]:
    """Seconds of each job: the lower quartile over `repeats` rounds, after one round to warm up. A job that takes long is left
    out of the later rounds, once it was timed for `ENOUGH` seconds.

    Rounds go through the jobs forwards and backwards in turn, so that a drift of the machine (clock, other work) affects all
    jobs alike. A disturbance in three of four rounds does not change the lower quartile; that matters as these times are kept.
    `before` is called before every run and is not timed; `advance` after every round.
    """
    order = list(jobs)
    seconds: dict[Key, list[float]] = {key: [] for key in order}
    for repeat in range(repeats + 1):
        for key in order if repeat % 2 else reversed(order):
            if sum(seconds[key]) >= ENOUGH:
                continue
            before()
            _synchronise(device)
            began = time.perf_counter()
            jobs[key]()
            _synchronise(device)
            if repeat:
                seconds[key].append(time.perf_counter() - began)
        advance()
    return {key: sorted(values)[len(values) // 4] for key, values in seconds.items()}


def bushy(nodes: int) -> TreeBatch:
    """A binary tree, about as deep as the trees that are chosen. The cost of a forward depends on the number of nodes alone."""
    return TreeBatch.single((-1, *((node - 1) // 2 for node in range(1, nodes))))


def _synchronise(device: torch.device) -> None:
    """Wait until a GPU has done its work, so that the clock includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
