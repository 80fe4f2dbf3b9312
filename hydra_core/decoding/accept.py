"""Which drafted tokens stand: the longest path from the root on which every token is the base's own choice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.tree.topology import Topology


@dataclass(frozen=True)
class Accepted:
    """`path`: [B, depth + 1] int64 nodes from the root down, padded by repeating the last; `counts`: [B] nodes kept,
    root included; `emitted`: [B, depth + 1] the base's choice after each node of the path, of which `counts` count."""

    path: Tensor
    counts: Tensor
    emitted: Tensor


def accept(tokens: Tensor, topology: Topology, chosen: Tensor) -> Accepted:
    """Keep a node when its parent is kept and the base's choice at the parent is the node's token.

    `tokens`: [B, N] drafted (node 0 the root; a negative id is a node that was not filled and never matches);
    `chosen`: [B, N] the base's choice after each node. Siblings must hold different tokens, so at most one child of a
    node can match and the kept nodes form one path.
    """
    device = tokens.device
    parents = torch.tensor(topology.parents, device=device).clamp(min=0)
    match = tokens == chosen[:, parents]
    match[:, 0] = True
    ancestors = topology.ancestors.to(device)
    kept = (match[:, None, :] | ~ancestors).all(-1)                              # [B, N]
    depths = torch.tensor(topology.depths, device=device)
    deepest = torch.where(kept, depths, -1).argmax(-1)                           # [B]
    path = topology.routes.to(device)[deepest]
    return Accepted(path, depths[deepest] + 1, chosen.gather(1, path))
