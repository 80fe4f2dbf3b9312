"""Search for trees: nodes by how often their whole rank path is right, then the size that is fastest on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hydra_core.tree.costs import StepCosts
from hydra_core.tree.draft_tree import PLAIN, DraftTree, RankPath
from hydra_core.tree.simulation import RankRows, walk

REFERENCE_NODES = 16
"""Size of the tree with which checkpoints of one drafter are compared: about what pays for one request on a CPU."""


def rank_paths(rows: RankRows, nodes: int, max_rank: int | None = None,
               max_depth: int | None = None) -> tuple[RankPath, ...]:
    """The `nodes` paths below the root that are right most often, most frequent first.

    Joint counts, not products of per-head rates: the heads' hits are not independent. A path is never more frequent
    than its parent and ties keep the shallower, so every prefix of the answer contains the parents of its paths: trees of
    increasing size are nested. `max_rank` (default: `nodes`) bounds the ranks of candidates, `max_depth` the length of paths.
    """
    limit = nodes if max_rank is None else max_rank
    counts: Counter[RankPath] = Counter()
    for ranks in rows.ranks[:, :max_depth].tolist():
        path: RankPath = ()
        for rank in ranks:
            if rank >= limit:
                break
            path = (*path, rank)
            counts[path] += 1
    ordered = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return tuple(ordered[:nodes])


def nested_trees(rows: RankRows, max_nodes: int, max_depth: int | None = None) -> tuple[DraftTree, ...]:
    """Trees of 1, 2, ... `max_nodes` nodes, root included, each within the next, none deeper than `max_depth`;
    fewer if no more paths were ever right."""
    paths = rank_paths(rows, max_nodes - 1, max_depth=max_depth)
    return tuple(DraftTree(paths[:size]) for size in range(len(paths) + 1))


def candidate_trees(rows: RankRows, max_nodes: int) -> tuple[DraftTree, ...]:
    """The nested trees of every depth limit, each once, plain decoding first.

    A head costs the same for one candidate as for many, so a shallower tree may be faster than the most accepted one of the
    same size.
    """
    limits = range(1, rows.ranks.shape[1] + 1)
    return tuple(dict.fromkeys(tree for limit in limits for tree in nested_trees(rows, max_nodes, limit)))


def typical_trees(trees: Sequence[DraftTree]) -> dict[int, DraftTree]:
    """Depth -> the tree of that depth whose size is nearest to `REFERENCE_NODES`, with which its drafting is timed."""
    nearest: dict[int, DraftTree] = {}
    for tree in sorted(trees, key=lambda tree: (abs(tree.size - REFERENCE_NODES), tree.size)):
        if tree.depth:
            nearest.setdefault(tree.depth, tree)
    return dict(sorted(nearest.items()))


def reference_tokens_per_step(rows: RankRows, nodes: int = REFERENCE_NODES) -> float:
    """Tokens per step of the best tree of `nodes` nodes, fitted to these rows.

    Fitted rather than fixed: the tree stage fits a tree to the chosen heads anyway, so this compares checkpoints as they will
    be used. Fitting 15 paths to thousands of tuples flatters all checkpoints equally.
    """
    return walk(DraftTree(rank_paths(rows, nodes - 1)), rows).tokens_per_step


@dataclass(frozen=True)
class Choice:
    """The tree for one batch size: expected tokens and seconds of a step, and the seconds of a plain one."""

    batch: int
    tree: DraftTree
    tokens_per_step: float
    seconds_per_step: float
    plain_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole batch."""
        return self.batch * self.tokens_per_step / self.seconds_per_step

    @property
    def gain(self) -> float:
        """Expected speed relative to plain decoding at the same batch size; 1.0 for the plain tree."""
        return self.tokens_per_second * self.plain_seconds / self.batch


def score_trees(trees: Sequence[DraftTree], rows: RankRows, costs: StepCosts, batches: Sequence[int]) -> dict[int, list[Choice]]:
    """Every tree as a choice for each batch size. A tree is walked once, since its acceptance does not depend on the batch."""
    walked = [(tree, walk(tree, rows).tokens_per_step if tree.paths else 1.0) for tree in trees]
    return {batch: [Choice(batch, tree, tokens, costs.seconds(batch, tree.size, tree.depth), costs.seconds(batch, 1, 0))
                    for tree, tokens in walked] for batch in batches}


def best_of_each_size(choices: Sequence[Choice]) -> list[Choice]:
    """The fastest tree of each size, smallest first; ties keep the shallower."""
    best: dict[int, Choice] = {}
    for choice in sorted(choices, key=lambda choice: choice.tree.depth):
        size = choice.tree.size
        if size not in best or choice.tokens_per_second > best[size].tokens_per_second:
            best[size] = choice
    return [best[size] for size in sorted(best)]


def best_choice(choices: Sequence[Choice]) -> Choice:
    """The fastest choice; ties keep the smaller tree, and plain decoding wins when nothing beats it.

    Raises ValueError when plain decoding is not among the choices.
    """
    if not any(choice.tree == PLAIN for choice in choices):
        raise ValueError("plain decoding must be among the choices")
    return max(choices, key=lambda choice: (choice.tokens_per_second, -choice.tree.size))
