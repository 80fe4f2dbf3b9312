"""Trees: shape, order, refusal of what is not one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydra_core.errors import InputError
from hydra_core.tree import PLAIN, Forest, Topology, Tree, TreeSet, chain, default_trees

PATHS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=8)


def closed(paths: list[list[int]]) -> Tree:
    """The smallest tree that holds `paths`."""
    return Tree(tuple({tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}))


@given(PATHS)
def test_nodes_know_their_ancestors(paths: list[list[int]]) -> None:
    tree = closed(paths)
    topology, every = tree.topology, ((), *tree.paths)
    assert topology.size == tree.size == len(every) and topology.depth == tree.depth
    for node, path in enumerate(every):
        above = {other for other, prefix in enumerate(every) if path[:len(prefix)] == prefix}
        assert set(topology.forest.ancestors[0, node].nonzero().flatten().tolist()) == above
        assert topology.depths[node] == len(path)
        route = [every.index(path[:end]) for end in range(len(path) + 1)]
        assert topology.routes[node, :len(path) + 1].tolist() == route
        assert all(again == node for again in topology.routes[node, len(path):].tolist())
    assert list(topology.depths) == sorted(topology.depths)


@given(PATHS)
def test_levels_fill_every_node_once(paths: list[list[int]]) -> None:
    tree = closed(paths)
    filled = [node for level in tree.levels for node in level.nodes]
    assert filled == list(range(1, tree.size))
    for level in tree.levels:
        for place, node in enumerate(level.nodes):
            parent = level.sources[int(level.source_of[place])]
            assert parent == tree.topology.parents[node] and int(level.ranks[place]) < level.width
    assert TreeSet.from_json(TreeSet({1: tree}).to_json()) == TreeSet({1: tree})


@pytest.mark.parametrize("paths", [((),), ((0,), (0,)), ((0, 1),), ((-1,),)])
def test_bad_trees(paths: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="tree path"):
        Tree(paths)


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1)])
def test_bad_topologies(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"topology|parent"):
        Topology(parents)


def test_chain() -> None:
    forest, wanted = chain(4), Topology((-1, 0, 1, 2)).forest
    assert forest.size == 4 and forest.depth == wanted.depth == 3
    for name in ("parents", "depths", "ancestors"):
        assert torch.equal(getattr(forest, name), getattr(wanted, name))


def test_forest_of_different_trees() -> None:
    """Every row is as if it stood alone."""
    rows = [tuple(random.Random(seed).randrange(node) if node else -1 for node in range(13)) for seed in range(20)]
    alone = [Topology(row) for row in rows]
    together = Forest.of(np.array(rows), max(topology.depth for topology in alone))
    for row, topology in enumerate(alone):
        assert torch.equal(together.ancestors[row], topology.forest.ancestors[0])
        assert together.depths[row].tolist() == list(topology.depths)
    for node in range(13):
        routes = together.routes_to(torch.full((len(rows),), node))
        for row, topology in enumerate(alone):
            assert routes[row, :topology.depth + 1].tolist() == topology.routes[node].tolist()


def test_batch_sizes_round_up() -> None:
    one, two = Tree(((0,), (1,))), Tree(((0,),))
    trees = TreeSet({4: two, 1: one, 16: PLAIN})
    assert [trees.for_batch(batch) for batch in (1, 2, 4, 5, 16, 99)] == [one, two, two, PLAIN, PLAIN, PLAIN]
    assert (trees.max_nodes, trees.max_depth) == (3, 1)
    assert default_trees().for_batch(64) == PLAIN
    assert default_trees(2).max_depth == 2 and default_trees(1).for_batch(1) == Tree(((0,), (1,), (2,)))


@pytest.mark.parametrize("values", [[], {"x": []}, {"1": [[0, 1]]}, {"1": 5}, {}, {"0": []}])
def test_broken_tree_files_name_the_file(values: object) -> None:
    with pytest.raises(InputError, match=r"it/tree\.json"):
        TreeSet.from_json(values, "it/tree.json")
