"""Which drafted tokens stand: the longest path from the root on which every token is the base's own choice.

Two pure functions: `accept` for choices that are known at every node (greedy rows), `accept_walking` for choices that
cost something or depend on the path (noise, penalties, log probabilities), made at the visited nodes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hydra_core.decoding.choose import Chooser, choose, token_logprob
from hydra_core.decoding.records import TokenLogprob, Typical
from hydra_core.tree.topology import Topology


@dataclass(frozen=True)
class Accepted:
    """`path`: [B, depth + 1] int64 nodes from the root down, padded by repeating the last; `counts`: [B] nodes kept,
    root included; `emitted`: for each row the base's choice after each kept node; `logprobs`: for each row and choice,
    where they were asked for."""

    path: Tensor
    counts: Tensor
    emitted: list[list[int]]
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


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
    counts = depths[deepest] + 1
    emitted = [row[:count] for row, count in zip(chosen.gather(1, path).tolist(), counts.tolist(), strict=True)]
    return Accepted(path, counts, emitted)


def accept_walking(tokens: Tensor, topology: Topology, logits: Tensor, positions: Sequence[int],
                   choosers: Sequence[Chooser]) -> Accepted:
    """The same, choosing depth by depth at the nodes that are reached.

    `logits`: [B, N, V] float32 at the nodes; `positions`: [B] where each row's root stands. Choosers record what was
    chosen, as penalties at a node count its ancestors.
    """
    drafted = tokens.tolist()
    children = topology.children
    paths = [[0] for _ in choosers]
    emitted: list[list[int]] = [[] for _ in choosers]
    logprobs: list[list[TokenLogprob]] = [[] for _ in choosers]
    active = list(range(len(choosers)))
    while active:
        at = [paths[row][-1] for row in active]
        reached = logits[active, at]
        where = [positions[row] + topology.depths[node] + 1 for row, node in zip(active, at, strict=True)]
        picked = choose(reached, where, [choosers[row] for row in active])
        going = []
        for place, (row, node, token) in enumerate(zip(active, at, picked, strict=True)):
            request = choosers[row].request
            child = _child(children[node], drafted[row], token)
            if request.typical is not None and (other := _typical_child(
                    choosers[row], request.typical, reached[place], children[node], drafted[row])) is not None:
                child, token = other, drafted[row][other]
            emitted[row].append(token)
            choosers[row].record(token)
            if request.logprobs is not None:
                logprobs[row].append(token_logprob(reached[place], token, request.logprobs))
            if child is not None:
                paths[row].append(child)
                going.append(row)
        active = going
    longest = topology.depth + 1
    padded = [path + [path[-1]] * (longest - len(path)) for path in paths]
    counts = torch.tensor([len(path) for path in paths], device=tokens.device)
    return Accepted(torch.tensor(padded, device=tokens.device), counts, emitted, logprobs)


def _child(children: Sequence[int], drafted: Sequence[int], token: int) -> int | None:
    return next((child for child in children if drafted[child] == token), None)


def _typical_child(chooser: Chooser, typical: Typical, logits: Tensor, children: Sequence[int],
                   drafted: Sequence[int]) -> int | None:
    """The likeliest child that typical acceptance lets stand, or None."""
    filled = [child for child in children if drafted[child] >= 0]
    if not filled:
        return None
    log_p = torch.log_softmax(chooser.process(logits), dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum()
    bound = torch.clamp(typical.alpha * torch.exp(-entropy), max=typical.threshold)
    chances = p[torch.tensor([drafted[child] for child in filled], device=p.device)]
    best = int(chances.argmax())
    return filled[best] if bool(chances[best] > bound) else None
