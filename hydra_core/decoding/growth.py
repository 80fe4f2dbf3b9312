"""A draft tree grown for each row and step: the likeliest continuations, as many as pay.

Best-first by the chance that a whole path stands (EAGLE-2, arXiv 2406.16858; OPT-Tree, arXiv 2406.17276): chances of a
node given its parent are learned (`rates`) and multiplied along the path, so no node is likelier than its parent. Copied
chains and heads' candidates go into the same tree, where the same token after the same parent is one node.

    M candidates of each row, parents before children, the root first
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hydra_core.decoding.rates import Rates
from hydra_core.tree.forest import Forest
from hydra_core.tree.topology import chain


@dataclass(frozen=True)
class Candidates:
    """`tokens`, `parents`, `kinds`: [B, M] int64 (parent -1 at the root, kind -1 where nothing is learned, token -1 where
    nothing is drafted); `chances`: [B, M] float32 of the whole path, 0 where nothing is drafted; `depth`: no node is
    deeper."""

    tokens: Tensor
    parents: Tensor
    kinds: Tensor
    chances: Tensor
    depth: int = 0

    @classmethod
    def roots(cls, roots: Tensor) -> Candidates:
        """Nothing but the tokens [B] that the base has chosen."""
        root = torch.full_like(roots[:, None], -1)
        return cls(roots[:, None], root, root, torch.ones(roots[:, None].shape, device=roots.device))

    def joined(self, tokens: Tensor, parents: Tensor, kinds: Tensor, chances: Tensor, depth: int) -> Candidates:
        """With m more nodes, each [B, m]."""
        return Candidates(torch.cat((self.tokens, tokens), 1), torch.cat((self.parents, parents), 1),
                          torch.cat((self.kinds, kinds), 1), torch.cat((self.chances, chances), 1),
                          max(self.depth, depth))


@dataclass(frozen=True)
class Copied:
    """Chains copied from the text: `tokens` [B, L] int64, -1 past an end; `matches`: [B] class of the match."""

    tokens: Tensor
    matches: Tensor


def add_copied(known: Candidates, copied: Copied, rates: Rates, sampled: Tensor) -> Candidates:
    """`known` with the copied chains in it. Where a chain runs along nodes that stand already they become likelier."""
    length, size = copied.tokens.shape[1], known.tokens.shape[1]
    fresh = copied.tokens >= 0
    kinds = rates.copied_kinds(length, copied.matches, sampled)                 # [B, L]
    stands = torch.arange(size, size + length, device=kinds.device).repeat(len(kinds), 1)  # the node of each token
    along, at = _along(known, copied.tokens)                                    # [B, M]: no chain runs along further
    met = along.shape[1]
    if met:
        agreed = rates.agreed_kinds(known.kinds.gather(1, at), copied.matches[:, None], sampled[:, None])
        kinds[:, :met] = torch.where(along, agreed, kinds[:, :met])
        stands[:, :met] = torch.where(along, at, stands[:, :met])
    path = rates.chances(kinds) * fresh
    if met:
        path = _lifted(path, along, known.chances.gather(1, at))
        fresh[:, :met] &= ~along
        target = torch.where(along, at, 0)  # what was not met is written to the root, as it was
        known = replace(known, kinds=known.kinds.scatter(1, target, torch.where(along, kinds[:, :met], known.kinds[:, :1])),
                        chances=known.chances.scatter(1, target, torch.where(along, path[:, :met], known.chances[:, :1])))
    else:
        path = path.cumprod(1)
    parents = torch.cat((torch.zeros_like(stands[:, :1]), stands[:, :-1]), dim=1)
    return known.joined(torch.where(fresh, copied.tokens, -1), parents, torch.where(fresh, kinds, -1),
                        torch.where(fresh, path, 0.0), length)


def _along(known: Candidates, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens of each chain [B, L] stand already, from the root down, and the nodes where they do: [B, M] bool and
    int64, M the longest such run."""
    here = torch.zeros_like(tokens[:, 0])
    going = torch.ones_like(here, dtype=torch.bool)
    met, at = [], []
    for depth in range(min(known.depth, tokens.shape[1])):
        same = (known.parents == here[:, None]) & (known.tokens == tokens[:, depth, None])
        going = going & same.any(1) & (tokens[:, depth] >= 0)
        if not bool(going.any()):  # a chain that has left the tree never comes back to it
            break
        here = same.int().argmax(1)
        met.append(going)
        at.append(here)
    if not met:
        return going[:, None][:, :0], here[:, None][:, :0]
    return torch.stack(met, 1), torch.stack(at, 1)


def _lifted(given: Tensor, along: Tensor, chances: Tensor) -> Tensor:
    """Chances of whole chains [B, L] from those of each token after the one before: a token that stands already is never
    less likely than it was."""
    met, path, columns = along.shape[1], torch.ones_like(given[:, 0]), []
    for depth in range(met):
        path = path * given[:, depth]
        path = torch.where(along[:, depth], torch.maximum(path, chances[:, depth]), path)
        columns.append(path)
    return torch.cat((torch.stack(columns, 1), path[:, None] * given[:, met:].cumprod(1)), dim=1)


@dataclass(frozen=True)
class Worth:
    """How many nodes a row are worth verifying: `nodes`; `expected`: tokens a row that they make; `gain`: tokens of all
    rows a second; `seconds`: of the step; `order`: [B, M] the candidates, likeliest first."""

    nodes: int
    expected: float
    gain: float
    seconds: float
    order: Tensor


def weigh(candidates: Candidates, seconds: Tensor) -> Worth:
    """As many of the likeliest nodes as make the most tokens a second; one of them is the root.

    `seconds`: [most] float32, what a step takes that verifies 1, 2, ... nodes a row, drafting included.
    """
    chances, order = candidates.chances.sort(dim=1, descending=True, stable=True)  # ties keep the parent
    most = min(len(seconds), chances.shape[1])
    expected = chances[:, :most].sum(0).cumsum(0)
    rates = expected / seconds[:most]
    best = int(rates.argmax())
    return Worth(best + 1, float(expected[best]) / len(chances), float(rates[best]), float(seconds[best]), order)


@dataclass(frozen=True)
class Grown:
    """The nodes to verify: `tokens`, `kinds` [B, N] int64, and their `forest`."""

    tokens: Tensor
    kinds: Tensor
    forest: Forest


def select(candidates: Candidates, worth: Worth) -> Grown:
    """The tree of the nodes that are worth it."""
    nodes = worth.nodes
    if nodes == 1:
        return Grown(candidates.tokens[:, :1], candidates.kinds[:, :1], chain(1))
    kept = worth.order[:, :nodes].sort(dim=1).values
    place = torch.zeros_like(candidates.parents).scatter_(1, kept, torch.arange(nodes, device=kept.device).expand_as(kept))
    parents = place.gather(1, candidates.parents.gather(1, kept).clamp(min=0))
    parents[:, 0] = -1
    return Grown(candidates.tokens.gather(1, kept), candidates.kinds.gather(1, kept),
                 Forest.of(parents, min(candidates.depth, nodes - 1)))
