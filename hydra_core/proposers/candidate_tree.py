"""Candidate trees of a step: the candidates of heads and copied text with the probability that each is accepted.

The expansion phase of a dynamic tree (EAGLE-2, arXiv 2406.16858; OPT-Tree, arXiv 2406.17276): the probability of a node given
its parent is learned (`AcceptanceEstimator`) and multiplied along the path, so no node is more probable than its parent.
Copied chains, continuations of earlier answers and the candidates of heads go into the same tree, where the same token after the
same parent is one node.
`node_budget` chooses which of the nodes are verified.

NumPy on the host: these are hundreds of numbers, and an operation on them costs a quarter of what it does in PyTorch.

    B sequences, M candidates of each; parents come before children, the root first
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_core.proposers.acceptance import AcceptanceEstimator, Bools, Floats, Ints
from hydra_core.proposers.suffix import SuffixTrees


@dataclass(frozen=True)
class CandidateTrees:
    """One tree of candidates for each sequence.

    `tokens`, `parents`, `kinds`: [B, M] int64; the parent is -1 at the root, the kind -1 where nothing is learned, the token
    -1 where a place is empty; `path_probs`: [B, M] float64, probability that the whole path is accepted, 0 at empty places;
    `depth`: an upper bound of the depth of all nodes.
    """

    tokens: Ints
    parents: Ints
    kinds: Ints
    path_probs: Floats
    depth: int = 0

    @classmethod
    def roots(cls, roots: Ints) -> CandidateTrees:
        """Only the roots: the tokens [B] that the base has chosen."""
        root = np.full((len(roots), 1), -1)
        return cls(roots[:, None], root, root, np.ones((len(roots), 1)))

    def extended(self, tokens: Ints, parents: Ints, kinds: Ints, path_probs: Floats, depth: int) -> CandidateTrees:
        """The trees with m more nodes each; the arrays are [B, m]."""
        return CandidateTrees(np.concatenate((self.tokens, tokens), 1), np.concatenate((self.parents, parents), 1),
                              np.concatenate((self.kinds, kinds), 1), np.concatenate((self.path_probs, path_probs), 1),
                              max(self.depth, depth))


@dataclass(frozen=True)
class CopiedChains:
    """Chains copied from the text: `tokens` [B, L] int64, -1 past an end; `matches`: [B] int64, class of the match."""

    tokens: Ints
    matches: Ints


def merge_copied(trees: CandidateTrees, copied: CopiedChains, acceptance: AcceptanceEstimator,
                 sampled: Bools) -> CandidateTrees:
    """`trees` with the copied chains in them. Where a chain runs along existing nodes, these become more probable.

    `sampled`: [B], sequences that draw their tokens.
    """
    length, size = copied.tokens.shape[1], trees.tokens.shape[1]
    fresh = copied.tokens >= 0
    kinds = acceptance.copied_kinds(length, copied.matches, sampled)            # [B, L]
    node_of = np.arange(size, size + length)[None].repeat(len(kinds), 0)        # the node of each token
    shared, nodes = _shared_prefix(trees, copied.tokens)                        # [B, S]: no chain shares more nodes
    met, rows = shared.shape[1], np.arange(len(kinds))[:, None]
    if met:
        agreed = acceptance.agreed_kinds(trees.kinds[rows, nodes], copied.matches[:, None], sampled[:, None])
        kinds[:, :met] = np.where(shared, agreed, kinds[:, :met])
        node_of[:, :met] = np.where(shared, nodes, node_of[:, :met])
    path = acceptance.probabilities(kinds) * fresh
    if met:
        path = _raised(path, shared, trees.path_probs[rows, nodes])
        fresh[:, :met] &= ~shared
        target = np.where(shared, nodes, 0)  # the others are written to the root, which keeps its values
        new_kinds = np.where(shared, kinds[:, :met], trees.kinds[:, :1])
        new_probs = np.where(shared, path[:, :met], trees.path_probs[:, :1])
        trees = replace(trees, kinds=_written(trees.kinds, rows, target, new_kinds),
                        path_probs=_written(trees.path_probs, rows, target, new_probs))
    else:
        path = path.cumprod(1)
    parents = np.concatenate((np.zeros_like(node_of[:, :1]), node_of[:, :-1]), 1)
    return trees.extended(np.where(fresh, copied.tokens, -1), parents, np.where(fresh, kinds, -1),
                          np.where(fresh, path, 0.0), length)


def merge_suffix(trees: CandidateTrees, found: SuffixTrees, acceptance: AcceptanceEstimator, sampled: Bools) -> CandidateTrees:
    """`trees` with continuations of earlier answers in them. A node that is there already becomes more probable, never less.

    `sampled`: [B], sequences that draw their tokens.
    """
    rows, size = np.arange(len(found.tokens))[:, None], trees.tokens.shape[1]
    node_of = _places(trees, found)                                                     # [B, M]
    there, nodes = node_of < size, np.where(node_of < size, node_of, 0)
    kinds = acceptance.suffix_kinds(found.matches, found.shares, sampled)
    if there.any():
        known = np.where(there, trees.kinds[rows, nodes], -1)
        kinds = np.where(acceptance.of_heads(known), acceptance.suffix_agreed_kinds(known, found.shares, sampled), kinds)
    before = np.where(there, trees.path_probs[rows, nodes], 0.0)
    path = _paths(found.parents, acceptance.probabilities(kinds) * (found.tokens >= 0), before)
    above = np.where(found.parents >= 0, node_of[rows, found.parents], 0)
    if there.any():
        target = np.where(there & (path > before), nodes, 0)  # the others are written to the root, which keeps its values
        trees = replace(trees, kinds=_written(trees.kinds, rows, target, np.where(target > 0, kinds, trees.kinds[:, :1])),
                        path_probs=_written(trees.path_probs, rows, target, np.where(target > 0, path, trees.path_probs[:, :1])))
    fresh = ~there & (found.tokens >= 0)
    return trees.extended(np.where(fresh, found.tokens, -1), above, np.where(fresh, kinds, -1), np.where(fresh, path, 0.0),
                          found.depth)


def _paths(parents: Ints, given_parent: Floats, least: Floats) -> Floats:
    """Path probabilities [B, M] of candidates from those given their parent, none below `least`."""
    found = []
    for above, given, floors in zip(parents.tolist(), given_parent.tolist(), least.tolist(), strict=True):
        row: list[float] = []
        for parent, one, floor in zip(above, given, floors, strict=True):
            row.append(max((row[parent] if parent >= 0 else 1.0) * one, floor))
        found.append(row)
    return np.array(found)


def _places(trees: CandidateTrees, found: SuffixTrees) -> Ints:
    """The node of each candidate, [B, M] int64: one of `trees`, or from their size on the place where it is added."""
    size, places = trees.tokens.shape[1], []
    for tokens, parents, known, above in zip(found.tokens.tolist(), found.parents.tolist(), trees.tokens.tolist(),
                                             trees.parents.tolist(), strict=True):
        nodes = {pair: node for node, pair in enumerate(zip(above, known, strict=True)) if pair[1] >= 0}
        row: list[int] = []
        for place, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            row.append(nodes.get((row[parent] if parent >= 0 else 0, token), size + place))
        places.append(row)
    return np.array(places)


def _written(into: NDArray[Any], rows: Ints, columns: Ints, values: NDArray[Any]) -> NDArray[Any]:
    """A copy of `into` [B, M] with `values` [B, m] at those places."""
    copy = into.copy()
    copy[rows, columns] = values
    return copy


def _shared_prefix(trees: CandidateTrees, tokens: Ints) -> tuple[Bools, Ints]:
    """Which tokens of each chain [B, L] are nodes already, from the root down, and which nodes: [B, S] bool and int64, S the
    longest such prefix."""
    here = np.zeros(len(tokens), dtype=np.int64)
    going = np.ones(len(tokens), dtype=np.bool_)
    shared, nodes = [], []
    for depth in range(min(trees.depth, tokens.shape[1])):
        same = (trees.parents == here[:, None]) & (trees.tokens == tokens[:, depth, None])
        going = going & same.any(1) & (tokens[:, depth] >= 0)
        if not going.any():  # a chain that has left the tree never returns to it
            break
        here = same.argmax(1)
        shared.append(going)
        nodes.append(here)
    if not shared:
        return going[:, None][:, :0], here[:, None][:, :0]
    return np.stack(shared, 1), np.stack(nodes, 1)


def _raised(given_parent: Floats, shared: Bools, path_probs: Floats) -> Floats:
    """Path probabilities [B, L] of chains from those of each token given the one before; that of an existing node never
    falls."""
    met, path, columns = shared.shape[1], np.ones(len(given_parent)), []
    for depth in range(met):
        path = path * given_parent[:, depth]
        path = np.where(shared[:, depth], np.maximum(path, path_probs[:, depth]), path)
        columns.append(path)
    return np.concatenate((np.stack(columns, 1), path[:, None] * given_parent[:, met:].cumprod(1)), 1)
