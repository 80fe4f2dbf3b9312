"""Acceptance of drafted tokens: the longest path from the root on which every token is the base's own choice.

Two pure functions: `accept` for choices that are known at every node (greedy sequences), `accept_walking` for choices that
cost something or depend on the path (noise, penalties, log probabilities) and are made at the visited nodes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_core.proposers.base import Accepted
from hydra_core.sampling.request import TokenLogprob, Typical
from hydra_core.sampling.sampler import Sampler, sample, token_logprob
from hydra_core.tree.batch import TreeBatch


def accept(tokens: Tensor, trees: TreeBatch, chosen: Tensor) -> Accepted:
    """Accept a node when its parent is accepted and the base's choice at the parent is the node's token.

    `tokens`: [B, N] int64 drafted (node 0 the root; a negative id is an empty node and never matches); `chosen`: [B, N] int64,
    the base's choice after each node. Siblings must hold different tokens, so at most one child of a node can match and the
    accepted nodes form one path.
    """
    return (accept_on_host if tokens.device.type == "cpu" else accept_on_device)(tokens, trees, chosen)


def accept_on_device(tokens: Tensor, trees: TreeBatch, chosen: Tensor) -> Accepted:
    """`accept` with tensor operations on a GPU, which the host waits for once."""
    trees = trees.to(tokens.device)
    match = tokens == chosen.gather(1, trees.parents.clamp(min=0).expand(len(tokens), -1))
    match[:, 0] = True
    kept = (match[:, None, :] | ~trees.ancestors).all(-1)                        # [B, N]
    depths, deepest = torch.where(kept, trees.depths, -1).max(-1)                # [B]
    path = trees.paths_to(deepest)
    counts = depths + 1
    emitted = [row[:count] for row, count in zip(chosen.gather(1, path).tolist(), counts.tolist(), strict=True)]
    return Accepted(path, counts, emitted)


def accept_on_host(tokens: Tensor, trees: TreeBatch, chosen: Tensor) -> Accepted:
    """`accept` with numbers in lists: a few dozen comparisons, for which tensors cost ten times as much."""
    all_parents = trees.parents.tolist()
    paths, emitted = [], []
    for row, (drafted, picked) in enumerate(zip(tokens.tolist(), chosen.tolist(), strict=True)):
        parents = all_parents[row if len(all_parents) > 1 else 0]
        depths, deepest = [0] + [-1] * (len(parents) - 1), 0
        for node in range(1, len(parents)):  # parents come first
            above = parents[node]
            if depths[above] >= 0 and drafted[node] == picked[above]:
                depths[node] = depths[above] + 1
                if depths[node] > depths[deepest]:
                    deepest = node
        path = [deepest]
        while path[-1]:
            path.append(parents[path[-1]])
        paths.append(path[::-1])
        emitted.append([picked[node] for node in paths[-1]])
    return Accepted(_padded(paths), torch.tensor([len(path) for path in paths]), emitted)


def _padded(paths: Sequence[Sequence[int]]) -> Tensor:
    """[B, longest] int64, each path padded with its last node."""
    longest = max(len(path) for path in paths)
    return torch.tensor([[*path, *[path[-1]] * (longest - len(path))] for path in paths])


def accept_walking(tokens: Tensor, trees: TreeBatch, logits: Tensor, positions: Sequence[int], samplers: Sequence[Sampler],
                   lines: Sequence[Sequence[int]] | None = None) -> Accepted:
    """`accept` that chooses depth by depth, at the nodes that are reached.

    `logits`: [M, V] float32, those of node n of sequence b in row `lines[b][n]`, or [B, N, V] without `lines`; `positions`: [B],
    position of each root. Samplers record what is chosen, so penalties at a node count its ancestors.
    """
    if lines is None:
        lines, logits = torch.arange(tokens.numel()).view_as(tokens).tolist(), logits.flatten(0, 1)
    drafted = tokens.tolist()
    children = [_children(parents) for parents in trees.parents.tolist()]
    children = children * len(samplers) if len(children) == 1 else children
    paths = [[0] for _ in samplers]
    emitted: list[list[int]] = [[] for _ in samplers]
    logprobs: list[list[TokenLogprob]] = [[] for _ in samplers]
    active = list(range(len(samplers)))
    while active:
        at = [paths[row][-1] for row in active]
        where_at = [lines[row][node] for row, node in zip(active, at, strict=True)]
        reached = logits if len(where_at) == len(logits) else logits[where_at]  # a copy of 128 rows costs as much as their draw
        token_positions = [positions[row] + len(paths[row]) for row in active]
        picked = sample(reached, token_positions, [samplers[row] for row in active])
        going = []
        for place, (row, node, token) in enumerate(zip(active, at, picked, strict=True)):
            request = samplers[row].request
            child = _child(children[row][node], drafted[row], token)
            if request.lossy_typical is not None and (other := _typical_child(
                    samplers[row], request.lossy_typical, reached[place], children[row][node], drafted[row])) is not None:
                child, token = other, drafted[row][other]
            emitted[row].append(token)
            samplers[row].record(token)
            if request.logprobs is not None:
                logprobs[row].append(token_logprob(reached[place], token, request.logprobs))
            if child is not None:
                paths[row].append(child)
                going.append(row)
        active = going
    counts = torch.tensor([len(path) for path in paths], device=tokens.device)
    return Accepted(_padded(paths).to(tokens.device), counts, emitted, logprobs)


def _children(parents: Sequence[int]) -> list[list[int]]:
    """The children of each node."""
    found: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], start=1):
        found[parent].append(node)
    return found


def _child(children: Sequence[int], drafted: Sequence[int], token: int) -> int | None:
    return next((child for child in children if drafted[child] == token), None)


def _typical_child(sampler: Sampler, typical: Typical, logits: Tensor, children: Sequence[int],
                   drafted: Sequence[int]) -> int | None:
    """The most probable child that typical acceptance allows, or None."""
    filled = [child for child in children if drafted[child] >= 0]
    if not filled:
        return None
    log_p = torch.log_softmax(sampler.process(logits), dim=-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum()
    bound = torch.clamp(typical.alpha * torch.exp(-entropy), max=typical.threshold)
    probs = p[torch.tensor([drafted[child] for child in filled], device=p.device)]
    best = int(probs.argmax())
    return filled[best] if bool(probs[best] > bound) else None
