"""The shape of a draft tree.

A tree is written as rank paths: (0, 2) is the third-ranked continuation of the first-ranked continuation of the root.

    root ── 0 ── 0,0        paths   (0,) (1,) (0,0) (0,2)
      │     └─── 0,2        node     1    2    3     4
      └──── 1               parent   0    0    1     1

Node 0 is the root: the token the base has already chosen. Nodes stand in order of depth, then path, so that a level is
a contiguous range and a parent comes before its children.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from hydra_core.errors import InputError
from hydra_core.tree.forest import Forest

RankPath = tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """Parents of N nodes; node 0 is the root with parent -1, and a parent's index is below its child's."""

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1:
            raise ValueError("a topology begins with its root, whose parent is -1")
        if any(not 0 <= parent < node for node, parent in enumerate(self.parents) if node):
            raise ValueError("a node's parent must come before it")

    @property
    def size(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node, root 0."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        return max(self.depths)

    @cached_property
    def forest(self) -> Forest:
        """The shape as tensors, for a batch whose rows all have it."""
        return Forest.of(np.array([self.parents]), self.depth)

    @cached_property
    def routes(self) -> Tensor:
        """[N, depth + 1] int64: the nodes from the root down to each node, padded with the node itself."""
        routes = torch.zeros(self.size, self.depth + 1, dtype=torch.int64)
        for node, parent in enumerate(self.parents[1:], start=1):
            routes[node] = routes[parent]
            routes[node, self.depths[node]:] = node
        return routes


KEPT_CHAIN = 64
"""Longest chain that is made once: drafts are shorter, and prompts come in too many lengths to keep a mask for each."""


def chain(nodes: int) -> Forest:
    """Root and `nodes - 1` descendants in one line, for all rows."""
    return _kept_chain(nodes) if nodes <= KEPT_CHAIN else _make_chain(nodes)


@lru_cache(maxsize=KEPT_CHAIN)
def _kept_chain(nodes: int) -> Forest:
    return _make_chain(nodes)


def _make_chain(nodes: int) -> Forest:
    index = torch.arange(nodes)[None]
    return Forest(index - 1, index, torch.ones(1, nodes, nodes, dtype=torch.bool).tril(), nodes - 1)


@dataclass(frozen=True)
class Level:
    """How one depth of a tree is filled from the one above.

    `parents`: [n] index of each node's parent among all nodes; `sources`: nodes of the level above that have children;
    `source_of`: [n] position of the parent in `sources`; `ranks`: [n]; `width`: candidates needed from each source.
    """

    nodes: range
    sources: tuple[int, ...]
    source_of: Tensor
    ranks: Tensor
    width: int


@dataclass(frozen=True)
class Tree:
    """A draft tree as rank paths below the root, in canonical order; `Tree(())` is plain decoding.

    Raises ValueError if a path stands twice, lacks its parent, or is empty.
    """

    paths: tuple[RankPath, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted((tuple(path) for path in self.paths), key=lambda path: (len(path), path)))
        object.__setattr__(self, "paths", ordered)
        known: set[RankPath] = {()}
        for path in ordered:
            if not path or min(path) < 0 or path in known:
                raise ValueError(f"tree path {path} is empty, negative or stands twice")
            if path[:-1] not in known:
                raise ValueError(f"tree path {path} lacks its parent {path[:-1]}")
            known.add(path)

    @property
    def size(self) -> int:
        """Nodes, root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        return len(self.paths[-1]) if self.paths else 0

    @cached_property
    def topology(self) -> Topology:
        index: dict[RankPath, int] = {(): 0} | {path: node for node, path in enumerate(self.paths, start=1)}
        return Topology((-1, *(index[path[:-1]] for path in self.paths)))

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Levels 1..depth, in the order in which drafting fills them."""
        parents = self.topology.parents
        levels = []
        for depth in range(1, self.depth + 1):
            nodes = [node for node, path in enumerate(self.paths, start=1) if len(path) == depth]
            sources = tuple(sorted({parents[node] for node in nodes}))
            position = {source: i for i, source in enumerate(sources)}
            ranks = [self.paths[node - 1][-1] for node in nodes]
            levels.append(Level(
                nodes=range(nodes[0], nodes[-1] + 1), sources=sources,
                source_of=torch.tensor([position[parents[node]] for node in nodes]),
                ranks=torch.tensor(ranks), width=max(ranks) + 1))
        return tuple(levels)


PLAIN = Tree(())


class TreeSet:
    """The tree for each measured batch size, down to plain decoding."""

    def __init__(self, trees: dict[int, Tree]) -> None:
        if not trees or min(trees) < 1:
            raise ValueError("a tree set maps batch sizes of at least 1 to trees")
        self.trees = dict(sorted(trees.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeSet) and self.trees == other.trees

    def __repr__(self) -> str:
        return f"TreeSet({ {batch: tree.size for batch, tree in self.trees.items()} } nodes)"

    def for_batch(self, batch: int) -> Tree:
        """The tree of the smallest measured batch size that is at least `batch`, else of the largest one.

        Rounding up is the cautious side: a tree grows dearer with the batch.
        """
        for measured, tree in self.trees.items():
            if measured >= batch:
                return tree
        return tree

    @property
    def max_nodes(self) -> int:
        return max(tree.size for tree in self.trees.values())

    @property
    def max_depth(self) -> int:
        return max(tree.depth for tree in self.trees.values())

    def to_json(self) -> dict[str, list[list[int]]]:
        return {str(batch): [list(path) for path in tree.paths] for batch, tree in self.trees.items()}

    @classmethod
    def from_json(cls, values: object, where: str = "tree.json") -> TreeSet:
        """Read what `to_json` wrote. Raises InputError that names `where`."""
        try:
            assert isinstance(values, dict)
            return cls({int(batch): Tree(tuple(tuple(int(rank) for rank in path) for path in paths))
                        for batch, paths in values.items()})
        except (AssertionError, TypeError, ValueError) as error:
            raise InputError(f"{where}: is not a map of batch sizes to rank paths ({error})") from None


def default_trees(heads: int = 4) -> TreeSet:
    """Before anything is measured: a small bushy tree for one request, a chain for a few, nothing for many; none deeper
    than `heads`."""
    bushy = Tree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 1)))
    sizes = {1: bushy, 4: Tree(((0,), (0, 0), (0, 0, 0))), 8: Tree(((0,),)), 9: PLAIN}
    return TreeSet({size: Tree(tuple(path for path in tree.paths if len(path) <= heads)) for size, tree in sizes.items()})
