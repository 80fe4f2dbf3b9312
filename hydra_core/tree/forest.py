"""A draft tree for each row of a batch, as tensors: what verification, acceptance and the cache work on.

`Topology` is one shape, known beforehand and shared by all rows; its `forest` is such a batch of one. Trees that are
grown while decoding have a shape for each row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Forest:
    """B trees of N nodes each, or one for all rows (B = 1). Node 0 is the root, parents come before their children.

    `parents`: [B, N] int64, -1 at the root; `depths`: [B, N] int64, root 0; `ancestors`: [B, N, N] bool, entry (i, j)
    says that j is i or above it; `depth`: no node is deeper.
    """

    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    depth: int
    _elsewhere: dict[torch.device, Forest] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, parents: NDArray[np.int64], depth: int) -> Forest:
        """From [B, N] parents, none of whose nodes is deeper than `depth`; on the host."""
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

    @property
    def size(self) -> int:
        """Nodes of each tree, root included."""
        return self.parents.shape[1]

    def to(self, device: torch.device) -> Forest:
        """The same on `device`; a tree that stays the same is copied once."""
        if self.parents.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Forest(self.parents.to(device), self.depths.to(device), self.ancestors.to(device),
                                             self.depth)
        return self._elsewhere[device]

    def routes_to(self, nodes: Tensor) -> Tensor:
        """The nodes from the root down to `nodes` [B]: [B, depth + 1] int64, padded with the node itself."""
        batch = len(nodes)
        above = self.ancestors.expand(batch, -1, -1)[torch.arange(batch, device=nodes.device), nodes]
        index = torch.arange(self.size, device=nodes.device)
        ordered = torch.where(above, index, self.size).sort(-1).values[:, :self.depth + 1]
        return torch.where(ordered < self.size, ordered, nodes[:, None])
