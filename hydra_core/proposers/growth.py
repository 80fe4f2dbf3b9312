"""A draft tree grown for each row and step: the likeliest continuations, as many as pay.

Best-first by the chance that a whole path stands (EAGLE-2, arXiv 2406.16858; OPT-Tree, arXiv 2406.17276): chances of a
node given its parent are learned (`rates`) and multiplied along the path, so no node is likelier than its parent. Copied
chains and heads' candidates go into the same tree, where the same token after the same parent is one node.

In NumPy, on the host: these are hundreds of numbers, and an operation on them costs a quarter of what it does in PyTorch.

    M candidates of each row, parents before children, the root first
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_core.proposers.acceptance import AcceptanceEstimator, Bools, Floats, Ints
from hydra_core.tree.forest import Forest
from hydra_core.tree.topology import chain


@dataclass(frozen=True)
class Candidates:
    """`tokens`, `parents`, `kinds`: [B, M] int64 (parent -1 at the root, kind -1 where nothing is learned, token -1 where
    nothing is drafted); `chances`: [B, M] float64 of the whole path, 0 where nothing is drafted; `depth`: no node is
    deeper."""

    tokens: Ints
    parents: Ints
    kinds: Ints
    chances: Floats
    depth: int = 0

    @classmethod
    def roots(cls, roots: Ints) -> Candidates:
        """Nothing but the tokens [B] that the base has chosen."""
        root = np.full((len(roots), 1), -1)
        return cls(roots[:, None], root, root, np.ones((len(roots), 1)))

    def joined(self, tokens: Ints, parents: Ints, kinds: Ints, chances: Floats, depth: int) -> Candidates:
        """With m more nodes, each [B, m]."""
        return Candidates(np.concatenate((self.tokens, tokens), 1), np.concatenate((self.parents, parents), 1),
                          np.concatenate((self.kinds, kinds), 1), np.concatenate((self.chances, chances), 1),
                          max(self.depth, depth))


@dataclass(frozen=True)
class Copied:
    """Chains copied from the text: `tokens` [B, L] int64, -1 past an end; `matches`: [B] class of the match."""

    tokens: Ints
    matches: Ints


def add_copied(known: Candidates, copied: Copied, rates: AcceptanceEstimator, sampled: Bools) -> Candidates:
    """`known` with the copied chains in it. Where a chain runs along nodes that stand already they become likelier."""
    length, size = copied.tokens.shape[1], known.tokens.shape[1]
    fresh = copied.tokens >= 0
    kinds = rates.copied_kinds(length, copied.matches, sampled)                 # [B, L]
    stands = np.arange(size, size + length)[None].repeat(len(kinds), 0)         # the node of each token
    along, at = _along(known, copied.tokens)                                    # [B, M]: no chain runs along further
    met, rows = along.shape[1], np.arange(len(kinds))[:, None]
    if met:
        agreed = rates.agreed_kinds(known.kinds[rows, at], copied.matches[:, None], sampled[:, None])
        kinds[:, :met] = np.where(along, agreed, kinds[:, :met])
        stands[:, :met] = np.where(along, at, stands[:, :met])
    path = rates.chances(kinds) * fresh
    if met:
        path = _lifted(path, along, known.chances[rows, at])
        fresh[:, :met] &= ~along
        target = np.where(along, at, 0)  # what was not met is written to the root, as it was
        known = replace(known, kinds=_written(known.kinds, rows, target, np.where(along, kinds[:, :met], known.kinds[:, :1])),
                        chances=_written(known.chances, rows, target, np.where(along, path[:, :met], known.chances[:, :1])))
    else:
        path = path.cumprod(1)
    parents = np.concatenate((np.zeros_like(stands[:, :1]), stands[:, :-1]), 1)
    return known.joined(np.where(fresh, copied.tokens, -1), parents, np.where(fresh, kinds, -1), np.where(fresh, path, 0.0),
                        length)


def _written(into: NDArray[Any], rows: Ints, columns: Ints, values: NDArray[Any]) -> NDArray[Any]:
    """A copy of `into` [B, M] with `values` [B, m] at those places."""
    made = into.copy()
    made[rows, columns] = values
    return made


def _along(known: Candidates, tokens: Ints) -> tuple[Bools, Ints]:
    """Which tokens of each chain [B, L] stand already, from the root down, and the nodes where they do: [B, M] bool and
    int64, M the longest such run."""
    here = np.zeros(len(tokens), dtype=np.int64)
    going = np.ones(len(tokens), dtype=np.bool_)
    met, at = [], []
    for depth in range(min(known.depth, tokens.shape[1])):
        same = (known.parents == here[:, None]) & (known.tokens == tokens[:, depth, None])
        going = going & same.any(1) & (tokens[:, depth] >= 0)
        if not going.any():  # a chain that has left the tree never comes back to it
            break
        here = same.argmax(1)
        met.append(going)
        at.append(here)
    if not met:
        return going[:, None][:, :0], here[:, None][:, :0]
    return np.stack(met, 1), np.stack(at, 1)


def _lifted(given: Floats, along: Bools, chances: Floats) -> Floats:
    """Chances of whole chains [B, L] from those of each token after the one before: a token that stands already is never
    less likely than it was."""
    met, path, columns = along.shape[1], np.ones(len(given)), []
    for depth in range(met):
        path = path * given[:, depth]
        path = np.where(along[:, depth], np.maximum(path, chances[:, depth]), path)
        columns.append(path)
    return np.concatenate((np.stack(columns, 1), path[:, None] * given[:, met:].cumprod(1)), 1)


@dataclass(frozen=True)
class Worth:
    """What is worth verifying: `kept`: [B, M] bool, the root of each row among them; `expected`: tokens a row that they make;
    `gain`: tokens of all rows a second; `seconds`: of the step."""

    kept: Bools
    expected: float
    gain: float
    seconds: float


def weigh_together(candidates: Candidates, seconds: Floats) -> Worth:
    """The likeliest nodes of each row, as many of every row as make the most tokens a second: for a base that computes the
    largest tree for all of them.

    `seconds`: [most], what a step takes that verifies 1, 2, ... nodes a row, drafting included.
    """
    order = (-candidates.chances).argsort(axis=1, kind="stable")  # ties keep the parent
    most = min(len(seconds), order.shape[1])
    rows = np.arange(len(order))[:, None]
    best, expected, gain = _fastest(candidates.chances[rows, order[:, :most]].sum(0).cumsum(), seconds)
    kept = np.zeros(order.shape, dtype=np.bool_)
    kept[rows, order[:, :best + 1]] = True
    return Worth(kept & (candidates.chances > 0), expected / len(order), gain, float(seconds[best]))


def weigh_apart(candidates: Candidates, seconds: Floats, most: int) -> Worth:
    """The likeliest nodes of all rows, as many as make the most tokens a second, whichever rows they are of: a row whose text
    goes on as it went before gets a long tree beside rows that get none. No row gets more than `most`.

    `seconds`: what a step takes that verifies 0, 1, ... nodes beside the roots, drafting included.
    """
    chances = candidates.chances
    if chances.shape[1] > most:
        least = np.sort(chances, axis=1)[:, -most, None]
        chances = np.where(chances >= least, chances, 0.0)  # of equals all stay for now
    chances, batch = chances[:, 1:], len(chances)
    order = (-chances.ravel()).argsort(kind="stable")[:len(seconds) - 1]
    expected = batch + np.concatenate(([0.0], chances.ravel()[order].cumsum()))
    best, made, gain = _fastest(expected, seconds)
    kept = np.zeros(candidates.chances.shape, dtype=np.bool_)
    kept[:, 0] = True
    drafts = np.zeros(chances.size, dtype=np.bool_)
    drafts[order[:best]] = True
    kept[:, 1:] = drafts.reshape(chances.shape) & (chances > 0)
    if chances.shape[1] >= most:
        kept &= kept.cumsum(1) <= most
    return Worth(kept, made / batch, gain, float(seconds[best]))


def _fastest(expected: Floats, seconds: Floats) -> tuple[int, float, float]:
    """Where the most tokens a second are made: the place, the tokens and the rate there."""
    rates = expected / seconds[:len(expected)]
    best = int(rates.argmax())
    return best, float(expected[best]), float(rates[best])


@dataclass(frozen=True)
class Grown:
    """The nodes to verify: `tokens`, `kinds` [B, N] int64, each -1 past a row's own nodes, and their `forest`."""

    tokens: Ints
    kinds: Ints
    forest: Forest


def select(candidates: Candidates, worth: Worth) -> Grown:
    """The tree of the nodes that are worth it."""
    counts = worth.kept.sum(1)
    nodes = int(counts.max())
    if nodes == 1:
        return Grown(candidates.tokens[:, :1], candidates.kinds[:, :1], chain(1))
    rows, kept = np.arange(len(counts))[:, None], (~worth.kept).argsort(axis=1, kind="stable")[:, :nodes]
    real = np.arange(nodes) < counts[:, None]
    place = np.zeros_like(candidates.parents)
    place[rows, kept] = np.arange(nodes)
    parents = np.where(real, place[rows, candidates.parents[rows, kept].clip(0)], 0)
    parents[:, 0] = -1
    return Grown(np.where(real, candidates.tokens[rows, kept], -1), np.where(real, candidates.kinds[rows, kept], -1),
                 Forest.of(parents, min(candidates.depth, nodes - 1)))
