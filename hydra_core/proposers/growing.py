"""Draft trees grown level by level by an autoregressive drafter: dynamic trees as in EAGLE-2 (arXiv 2406.16858), section 3.

Each level, the most probable paths so far are expanded: the drafter computes their last nodes, which see their ancestors in its
own KV cache (tree attention), and the best tokens after each become candidates. At the end the most probable of all candidates
are verified; a candidate is never more probable than its parent, so what is kept is a tree.

Letters: B sequences, W nodes of one level that are expanded, K candidates taken below a node, C candidates of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_core.proposers.base import Proposal
from hydra_core.tree.batch import TreeBatch


@dataclass(frozen=True)
class Growth:
    """The size of the trees.

    `depth`: most tokens ahead, so many forwards of the drafter a step; `beam`: nodes of one depth that are expanded; `width`:
    candidates taken below a node; `nodes`: candidates that are verified; `floor`: where no path is as probable, the tree is
    grown no deeper. With `beam` and `width` 1 it is a chain. Raises ValueError for sizes below 1 or a floor outside [0, 1).
    """

    depth: int = 5
    beam: int = 3
    width: int = 4
    nodes: int = 12
    floor: float = 0.05

    def __post_init__(self) -> None:
        for name in ("depth", "beam", "width", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor={self.floor}: must lie in [0, 1)")

    @property
    def written(self) -> int:
        """Nodes that the drafter writes to its own cache in a step, at most."""
        return (self.depth - 1) * self.beam


@dataclass(frozen=True)
class Level:
    """Nodes to expand: `tokens` [B, W] int64; `above` [B, W] int64, for each its parent among the nodes expanded before it (the
    level above), 0 at the first level; `trees`: all nodes that the drafter has written in this step and these behind them, as a
    forest below the root; `written`: how many of them were there before."""

    tokens: Tensor
    above: Tensor
    trees: TreeBatch
    written: int


Expand = Callable[[Level], Tensor]
"""Computes the nodes of a level: logits [B, W, n] float32 of what follows each."""
Rank = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""The best tokens by logits [B, W, n] at a depth below the root (from 0): ids [B, W, K] int64 and probabilities float32."""


@dataclass
class Grown:
    """Candidates below the roots: `tokens`, `parents` [B, C] int64, where a parent is a candidate, -1 the root; `probs` [B, C]
    float32, of the path from the root; `places` [B, C] int64, which node of the drafter's cache a candidate is, -1 for one that
    was not expanded."""

    tokens: Tensor
    parents: Tensor
    probs: Tensor
    places: Tensor
    depth: int

    def proposal(self, roots: Tensor, nodes: int) -> Proposal:
        """The `nodes` most probable candidates of each sequence below `roots` [B]."""
        tokens, parents = self.tokens.cpu().numpy(), self.parents.cpu().numpy()
        probs = self.probs.cpu().numpy()
        batch, some = len(tokens), min(nodes, tokens.shape[1])
        rows = np.arange(batch)[:, None]
        kept = (-probs).argsort(axis=1, kind="stable")[:, :some]  # ties keep the parent, which is the earlier one
        kept.sort(axis=1)
        place = np.full((batch, tokens.shape[1] + 1), 0)  # of the root too, by the index -1
        place[rows, kept] = np.arange(1, some + 1)
        above = np.concatenate((np.full((batch, 1), -1), place[rows, parents[rows, kept]]), axis=1)
        drafted = torch.as_tensor(tokens[rows, kept], device=roots.device)
        return Proposal(torch.cat((roots[:, None], drafted), dim=1), TreeBatch.of(above, self.depth))

    def written_paths(self, chosen: Sequence[Sequence[int]]) -> list[list[int]]:
        """For each sequence the nodes of the drafter's cache along `chosen`, the tokens after its root, as far as they go."""
        found = []
        for tokens, parents, places, path in zip(self.tokens.tolist(), self.parents.tolist(), self.places.tolist(), chosen,
                                                 strict=False):
            children = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
            at, nodes = -1, list[int]()
            for token in path:
                at = children.get((at, token), -2)
                if at < 0 or places[at] < 0:
                    break
                nodes.append(places[at])
            found.append(nodes)
        return found


def grow(growth: Growth, logits: Tensor, rank: Rank, expand: Expand) -> Grown:
    """Candidates below roots, of which the first level follows `logits` [B, 1, n]."""
    batch, device = len(logits), logits.device
    rows = torch.arange(batch, device=device)[:, None]
    frontier = torch.full((batch, 1), -1, dtype=torch.int64, device=device)           # candidates expanded last
    path_probs = torch.ones(batch, 1, device=device)
    grown: Grown | None = None
    ancestors = torch.zeros(batch, 0, 0, dtype=torch.bool, device=device)            # of the written nodes
    depths: list[int] = []
    for depth in range(growth.depth):
        tokens, given = rank(logits, depth)
        width = tokens.shape[2]
        parents = frontier.repeat_interleave(width, dim=1)
        probs = (path_probs[..., None] * given).flatten(1)
        first = 0 if grown is None else grown.tokens.shape[1]
        grown = _extended(grown, tokens.flatten(1), parents, probs, depth + 1)
        if depth + 1 == growth.depth or (growth.floor and float(probs.max()) < growth.floor):
            break
        best = probs.topk(min(growth.beam, probs.shape[1]), dim=1)
        source = best.indices // width                                              # [B, W], in the level before
        frontier, path_probs = first + best.indices, best.values
        written, wide = ancestors.shape[1], best.indices.shape[1]
        grown.places[rows, frontier] = written + torch.arange(wide, device=device)
        above = ancestors[rows, written - logits.shape[1] + source] if written else ancestors.new_zeros(batch, wide, 0)
        itself = torch.eye(wide, dtype=torch.bool, device=device).expand(batch, -1, -1)
        ancestors = torch.cat((torch.cat((ancestors, ancestors.new_zeros(batch, written, wide)), 2),
                               torch.cat((above, itself), 2)), 1)
        depths += [depth] * wide
        logits = expand(Level(grown.tokens[rows, frontier], source, _forest(depths, ancestors), written))
    assert grown is not None
    return grown


def _forest(depths: Sequence[int], ancestors: Tensor) -> TreeBatch:
    """Nodes without a common root: a forward reads depths and ancestors alone."""
    own = torch.tensor([depths], device=ancestors.device)
    return TreeBatch(torch.full_like(own, -1), own, ancestors, max(depths))


def _extended(grown: Grown | None, tokens: Tensor, parents: Tensor, probs: Tensor, depth: int) -> Grown:
    places = torch.full_like(tokens, -1)
    if grown is None:
        return Grown(tokens, parents, probs, places, depth)
    return Grown(torch.cat((grown.tokens, tokens), 1), torch.cat((grown.parents, parents), 1),
                 torch.cat((grown.probs, probs), 1), torch.cat((grown.places, places), 1), depth)


def padded(paths: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`paths` of nodes as `KVCache.commit` takes them: [B, M] int64, padded with the last node, and their lengths [B]."""
    most = max((len(path) for path in paths), default=0)
    table: NDArray[np.int64] = np.zeros((len(paths), most), dtype=np.int64)
    for row, path in enumerate(paths):
        table[row, :len(path)] = path
        table[row, len(path):] = path[-1] if path else 0
    return torch.as_tensor(table, device=device), torch.tensor([len(path) for path in paths], device=device)
