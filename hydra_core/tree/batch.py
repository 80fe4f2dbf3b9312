"""The draft trees of a batch of sequences as tensors: what verification, acceptance and the KV cache work on.

`DraftTree` is one fixed shape that all sequences share; its `as_batch` is a batch of one tree. A dynamic tree has a shape of
its own for each sequence and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class TreeBatch:
    """B trees of N nodes each, or one tree for all sequences (B = 1). Node 0 is the root; parents come before children.

    `parents`: [B, N] int64, -1 at the root; `depths`: [B, N] int64, 0 at the root; `ancestors`: [B, N, N] bool, entry (i, j)
    is true where j is i or an ancestor of i; `depth`: an upper bound of `depths`.
    """

    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    depth: int
    _copies: dict[torch.device, TreeBatch] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, parents: NDArray[np.int64], depth: int) -> TreeBatch:
        """Build it on the host from [B, N] parents, where no node is deeper than `depth`."""
        batch, nodes = parents.shape
        rows, above = np.arange(batch)[:, None], parents.clip(0)
        ancestors = np.eye(nodes, dtype=np.bool_)[None].repeat(batch, 0)
        reached, index = 1, above  # `index`: each node's ancestor `reached` steps up; doubling takes log2(depth) rounds
        while reached <= depth:
            ancestors = ancestors | ancestors[rows, index]
            index = index[rows, index]
            reached *= 2
        depths = ancestors.sum(-1, dtype=np.int64) - 1
        return cls(torch.from_numpy(parents), torch.from_numpy(depths), torch.from_numpy(ancestors), depth)

    @classmethod
    def single(cls, parents: Sequence[int]) -> TreeBatch:
        """One tree for all sequences from the parent of each node.

        Raises ValueError unless the first node is the root, with parent -1, and every other parent comes before its child.
        """
        if not parents or parents[0] != -1:
            raise ValueError("the first node must be the root, whose parent is -1")
        if any(not 0 <= parent < node for node, parent in enumerate(parents) if node):
            raise ValueError("a node's parent must come before it")
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        return cls.of(np.array([parents]), max(depths))

    @property
    def size(self) -> int:
        """Nodes of each tree, root included."""
        return self.parents.shape[1]

    def to(self, device: torch.device) -> TreeBatch:
        """The same trees on `device`; the copy is kept, so a tree that stays the same is copied once."""
        if self.parents.device == device:
            return self
        if device not in self._copies:
            self._copies[device] = TreeBatch(self.parents.to(device), self.depths.to(device), self.ancestors.to(device),
                                             self.depth)
        return self._copies[device]

    def paths_to(self, nodes: Tensor) -> Tensor:
        """The nodes from the root down to `nodes` [B]: [B, depth + 1] int64, padded with the node itself.

        A single tree takes any number of nodes.
        """
        batch = len(nodes)
        above = self.ancestors.expand(batch, -1, -1)[torch.arange(batch, device=nodes.device), nodes]
        index = torch.arange(self.size, device=nodes.device)
        ordered = torch.where(above, index, self.size).sort(-1).values[:, :self.depth + 1]
        return torch.where(ordered < self.size, ordered, nodes[:, None])


CACHED_CHAIN = 64
"""Longest chain that is cached: drafts are shorter, and prompts have too many lengths to keep a mask for each."""


def chain(nodes: int) -> TreeBatch:
    """A root and its `nodes - 1` descendants in one line, for all sequences."""
    return _cached_chain(nodes) if nodes <= CACHED_CHAIN else _make_chain(nodes)


@lru_cache(maxsize=CACHED_CHAIN)
def _cached_chain(nodes: int) -> TreeBatch:
    return _make_chain(nodes)


def _make_chain(nodes: int) -> TreeBatch:
    index = torch.arange(nodes)[None]
    return TreeBatch(index - 1, index, torch.ones(1, nodes, nodes, dtype=torch.bool).tril(), nodes - 1)
