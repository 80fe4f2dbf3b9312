"""The fixed shape of a draft tree, and the fixed tree for each batch size.

A tree is written as rank paths: (0, 2) is the third-ranked continuation of the first-ranked continuation of the root.

    root ── 0 ── 0,0        paths   (0,) (1,) (0,0) (0,2)
      │     └─── 0,2        node     1    2    3     4
      └──── 1               parent   0    0    1     1

Node 0 is the root: the token that the base has already chosen. Nodes are ordered by depth, then by path, so that the nodes
of one depth are a contiguous range and a parent comes before its children.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hydra_core.errors import InputError
from hydra_core.tree.batch import TreeBatch

RankPath = tuple[int, ...]


@dataclass(frozen=True)
class TreeLevel:
    """How the n nodes of one depth are filled from the nodes above that have children, the sources.

    `nodes`: their range; `paths`: [S, depth] int64, the nodes from the root to each of S sources; `source_of`: [n] int64,
    position of each node's parent among the sources; `ranks`: [n] int64; `width`: candidates needed from each source.
    """

    nodes: slice
    paths: Tensor
    source_of: Tensor
    ranks: Tensor
    width: int

    def to(self, device: torch.device) -> TreeLevel:
        """The same level with its tensors on `device`."""
        return TreeLevel(self.nodes, self.paths.to(device), self.source_of.to(device), self.ranks.to(device), self.width)


@dataclass(frozen=True)
class DraftTree:
    """A draft tree as rank paths below the root, in canonical order; `DraftTree(())` is plain decoding.

    Raises ValueError for a path that is repeated, lacks its parent, is empty or has a negative rank.
    """

    paths: tuple[RankPath, ...]

    def __post_init__(self) -> None:
        ordered = tuple(sorted((tuple(path) for path in self.paths), key=lambda path: (len(path), path)))
        object.__setattr__(self, "paths", ordered)
        seen: set[RankPath] = {()}
        for path in ordered:
            if not path or min(path) < 0 or path in seen:
                raise ValueError(f"tree path {path} is empty, negative or repeated")
            if path[:-1] not in seen:
                raise ValueError(f"tree path {path} lacks its parent {path[:-1]}")
            seen.add(path)

    @property
    def size(self) -> int:
        """Nodes, root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Depth of the deepest node, 0 for the root alone."""
        return len(self.paths[-1]) if self.paths else 0

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """The parent of each node, -1 at the root."""
        index: dict[RankPath, int] = {(): 0} | {path: node for node, path in enumerate(self.paths, start=1)}
        return (-1, *(index[path[:-1]] for path in self.paths))

    @cached_property
    def as_batch(self) -> TreeBatch:
        """The shape as tensors, for a batch in which all sequences have it."""
        return TreeBatch.single(self.parents)

    @cached_property
    def levels(self) -> tuple[TreeLevel, ...]:
        """Levels 1 .. depth, in the order in which drafting fills them."""
        parents, node_paths = self.parents, self.as_batch.paths_to(torch.arange(self.size))
        levels = []
        for depth in range(1, self.depth + 1):
            nodes = [node for node, path in enumerate(self.paths, start=1) if len(path) == depth]
            sources = sorted({parents[node] for node in nodes})
            position = {source: i for i, source in enumerate(sources)}
            ranks = [self.paths[node - 1][-1] for node in nodes]
            levels.append(TreeLevel(
                nodes=slice(nodes[0], nodes[-1] + 1), paths=node_paths[sources, :depth],
                source_of=torch.tensor([position[parents[node]] for node in nodes]),
                ranks=torch.tensor(ranks), width=max(ranks) + 1))
        return tuple(levels)


PLAIN = DraftTree(())
"""Plain decoding: the root alone."""


class TreeSet:
    """The tree for each measured batch size. Raises ValueError for no tree and for batch sizes below 1."""

    def __init__(self, trees: dict[int, DraftTree]) -> None:
        if not trees or min(trees) < 1:
            raise ValueError("a tree set maps batch sizes of at least 1 to trees")
        self.trees = dict(sorted(trees.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeSet) and self.trees == other.trees

    def __repr__(self) -> str:
        return f"TreeSet({ {batch: tree.size for batch, tree in self.trees.items()} } nodes)"

    def for_batch(self, batch: int) -> DraftTree:
        """The tree of the smallest measured batch size that is at least `batch`, or of the largest one where none is.

        Rounding up is the cautious side: a tree costs more in a larger batch.
        """
        for measured, tree in self.trees.items():
            if measured >= batch:
                return tree
        return tree

    @property
    def max_nodes(self) -> int:
        """Nodes of the largest tree."""
        return max(tree.size for tree in self.trees.values())

    @property
    def max_depth(self) -> int:
        """Depth of the deepest tree."""
        return max(tree.depth for tree in self.trees.values())

    def to_json(self) -> dict[str, list[list[int]]]:
        """The content of `tree.json`: batch size -> rank paths."""
        return {str(batch): [list(path) for path in tree.paths] for batch, tree in self.trees.items()}

    @classmethod
    def from_json(cls, values: object, where: str = "tree.json") -> TreeSet:
        """Read what `to_json` wrote. Raises InputError that names the file `where`."""
        try:
            assert isinstance(values, dict)
            return cls({int(batch): DraftTree(tuple(tuple(int(rank) for rank in path) for path in paths))
                        for batch, paths in values.items()})
        except (AssertionError, TypeError, ValueError) as error:
            raise InputError(f"{where}: is not a map of batch sizes to rank paths ({error})") from None


def default_trees(heads: int = 4) -> TreeSet:
    """Trees to use before anything is measured: a bushy tree for one sequence, a chain for a few, none for many; no tree is
    deeper than `heads`."""
    bushy = DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 1)))
    sizes = {1: bushy, 4: DraftTree(((0,), (0, 0), (0, 0, 0))), 8: DraftTree(((0,),)), 9: PLAIN}
    return TreeSet({size: DraftTree(tuple(path for path in tree.paths if len(path) <= heads)) for size, tree in sizes.items()})
