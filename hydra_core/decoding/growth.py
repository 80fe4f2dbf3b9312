"""A draft tree grown for each row and step: the likeliest continuations, as many as pay.

Best-first by the chance that a whole path stands (EAGLE-2, arXiv 2406.16858; OPT-Tree, arXiv 2406.17276): chances of a
node given its parent are learned (`rates`) and multiplied along the path, so no node is likelier than its parent. Copied
chains and heads' candidates go into the same tree, where the same token after the same parent is one node.

    M candidates of each row, parents before children, the root first
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.decoding.rates import Rates
from hydra_core.tree.forest import Forest


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
    batch, length = copied.tokens.shape
    rows = torch.arange(batch, device=copied.tokens.device)
    kinds, chances, size = known.kinds.clone(), known.chances.clone(), known.tokens.shape[1]
    here, path = torch.zeros_like(copied.matches), torch.ones(batch, device=chances.device)
    met = torch.full_like(sampled, size > 1)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for depth in range(length):
        tokens = copied.tokens[:, depth]
        drafted = tokens >= 0
        kind = rates.copied_kinds(depth, copied.matches, sampled)
        at = torch.zeros_like(here)
        if size > 1 and bool(met.any()):  # a chain that has left the tree never comes back to it
            same = (known.parents == here[:, None]) & (known.tokens == tokens[:, None])
            met = met & drafted & same.any(1)
            at = same.int().argmax(1)
            kind = torch.where(met, rates.agreed_kinds(kinds[rows, at], copied.matches, sampled), kind)
        path = path * rates.chances(kind) * drafted
        if size > 1:
            path = torch.where(met, torch.maximum(path, chances[rows, at]), path)
            kinds[rows, at] = torch.where(met, kind, kinds[rows, at])
            chances[rows, at] = torch.where(met, path, chances[rows, at])
        fresh = ~met & drafted
        columns.append((torch.where(fresh, tokens, -1), here, torch.where(fresh, kind, -1), torch.where(fresh, path, 0.0)))
        here = torch.where(met, at, size + depth)
    lifted = Candidates(known.tokens, known.parents, kinds, chances, known.depth)
    fresh_tokens, parents, fresh_kinds, fresh_chances = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
    return lifted.joined(fresh_tokens, parents, fresh_kinds, fresh_chances, length)


@dataclass(frozen=True)
class Grown:
    """The nodes that are worth verifying: `tokens`, `kinds` [B, N] int64; their `forest`; `gain`: expected tokens of all
    rows over the seconds of the step; `expected`: tokens a row; `seconds`: of the step."""

    tokens: Tensor
    kinds: Tensor
    forest: Forest
    gain: float
    expected: float
    seconds: float


def select(candidates: Candidates, seconds: Tensor) -> Grown:
    """The likeliest nodes, as many as make the most tokens a second; one of them is the root.

    `seconds`: [most] float32, what a step takes that verifies 1, 2, ... nodes a row, drafting included.
    """
    chances, order = candidates.chances.sort(dim=1, descending=True, stable=True)  # ties keep the parent
    most = min(len(seconds), chances.shape[1])
    expected = chances[:, :most].sum(0).cumsum(0)
    rates = expected / seconds[:most]
    best = int(rates.argmax())
    kept = order[:, :best + 1].sort(dim=1).values
    place = torch.zeros_like(candidates.parents).scatter_(1, kept, torch.arange(best + 1, device=kept.device).expand_as(kept))
    parents = place.gather(1, candidates.parents.gather(1, kept).clamp(min=0))
    parents[:, 0] = -1
    forest = Forest.of(parents, min(candidates.depth, best))
    return Grown(candidates.tokens.gather(1, kept), candidates.kinds.gather(1, kept), forest, float(rates[best]),
                 float(expected[best]) / len(kept), float(seconds[best]))
