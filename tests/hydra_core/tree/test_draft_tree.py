"""Trees: shape, order, and refusal of invalid ones."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hydra_core.errors import InputError
from hydra_core.tree import PLAIN, DraftTree, TreeBatch, TreeSet, chain, default_trees

PATHS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=8)


def closed(paths: list[list[int]]) -> DraftTree:
    """The smallest tree that holds `paths`."""
    return DraftTree(tuple({tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)}))


@given(PATHS)
def test_nodes_know_their_ancestors(paths: list[list[int]]) -> None:
    tree = closed(paths)
    batch, every = tree.as_batch, ((), *tree.paths)
    routes, depths = batch.paths_to(torch.arange(batch.size)), batch.depths[0].tolist()
    assert batch.size == tree.size == len(every) and batch.depth == tree.depth
    for node, path in enumerate(every):
        above = {other for other, prefix in enumerate(every) if path[:len(prefix)] == prefix}
        assert set(batch.ancestors[0, node].nonzero().flatten().tolist()) == above
        assert depths[node] == len(path)
        route = [every.index(path[:end]) for end in range(len(path) + 1)]
        assert routes[node, :len(path) + 1].tolist() == route
        assert all(again == node for again in routes[node, len(path):].tolist())
    assert depths == sorted(depths)


@given(PATHS)
def test_levels_fill_every_node_once(paths: list[list[int]]) -> None:
    tree = closed(paths)
    filled = [node for level in tree.levels for node in range(tree.size)[level.nodes]]
    assert filled == list(range(1, tree.size))
    for level in tree.levels:
        for place, node in enumerate(range(tree.size)[level.nodes]):
            parent = int(level.paths[int(level.source_of[place]), -1])
            assert parent == tree.parents[node] and int(level.ranks[place]) < level.width
    assert TreeSet.from_json(TreeSet({1: tree}).to_json()) == TreeSet({1: tree})


@pytest.mark.parametrize("paths", [((),), ((0,), (0,)), ((0, 1),), ((-1,),)])
def test_bad_trees(paths: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="tree path"):
        DraftTree(paths)


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -1)])
def test_bad_parents(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"root|parent"):
        TreeBatch.single(parents)


def test_chain() -> None:
    made, wanted = chain(4), TreeBatch.single((-1, 0, 1, 2))
    assert made.size == 4 and made.depth == wanted.depth == 3
    for name in ("parents", "depths", "ancestors"):
        assert torch.equal(getattr(made, name), getattr(wanted, name))


def test_batch_of_different_trees() -> None:
    """Every tree of a batch equals the tree alone."""
    rows = [tuple(random.Random(seed).randrange(node) if node else -1 for node in range(13)) for seed in range(20)]
    alone = [TreeBatch.single(row) for row in rows]
    together = TreeBatch.of(np.array(rows), max(tree.depth for tree in alone))
    for row, tree in enumerate(alone):
        assert torch.equal(together.ancestors[row], tree.ancestors[0])
        assert together.depths[row].tolist() == tree.depths[0].tolist()
    for node in range(13):
        routes = together.paths_to(torch.full((len(rows),), node))
        for row, tree in enumerate(alone):
            assert routes[row, :tree.depth + 1].tolist() == tree.paths_to(torch.arange(13))[node].tolist()


def test_batch_sizes_round_up() -> None:
    one, two = DraftTree(((0,), (1,))), DraftTree(((0,),))
    trees = TreeSet({4: two, 1: one, 16: PLAIN})
    assert [trees.for_batch(batch) for batch in (1, 2, 4, 5, 16, 99)] == [one, two, two, PLAIN, PLAIN, PLAIN]
    assert (trees.max_nodes, trees.max_depth) == (3, 1)
    assert default_trees().for_batch(64) == PLAIN
    assert default_trees(2).max_depth == 2 and default_trees(1).for_batch(1) == DraftTree(((0,), (1,), (2,)))


@pytest.mark.parametrize("values", [[], {"x": []}, {"1": [[0, 1]]}, {"1": 5}, {}, {"0": []}])
def test_broken_tree_files_name_the_file(values: object) -> None:
    with pytest.raises(InputError, match=r"it/tree\.json"):
        TreeSet.from_json(values, "it/tree.json")


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5])
def test_default_trees_hold_the_better_of_any_two_paths(heads: int) -> None:
    """A candidate of a lower rank is more probable: a path is in the tree only with all that are better at one place."""
    trees = default_trees(heads)
    for tree in trees.trees.values():
        for path in tree.paths:
            assert {(*path[:at], path[at] - 1, *path[at + 1:]) for at in range(len(path)) if path[at]} <= set(tree.paths)
    sizes = [tree.size for _, tree in sorted(trees.trees.items())]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 and trees.max_depth == min(heads, 4)
    assert [default_trees(4).for_batch(batch).size for batch in (1, 2, 4, 5, 8, 9, 100)] == [12, 4, 4, 2, 2, 1, 1]


def test_a_tree_is_copied_to_a_device_once() -> None:
    """"meta" holds shapes alone, and is another device on any machine."""
    batch = DraftTree(((0,), (1,), (0, 0))).as_batch
    assert batch.to(torch.device("cpu")) is batch
    copied = batch.to(torch.device("meta"))
    assert copied is batch.to(torch.device("meta")) and copied.depth == batch.depth == 2
    for name in ("parents", "depths", "ancestors"):
        own, other = getattr(batch, name), getattr(copied, name)
        assert (other.device.type, other.shape, other.dtype) == ("meta", own.shape, own.dtype)
    assert torch.equal(batch.depths, torch.tensor([[0, 1, 1, 2]]))  # what it was copied from is as it was


@pytest.mark.parametrize("nodes", [1, 2, 64, 65, 200])
def test_chains_of_any_length(nodes: int) -> None:
    """Those of prompts are longer than any that is kept."""
    found, wanted = chain(nodes), TreeBatch.single(range(-1, nodes - 1))
    assert found.size == nodes and found.depth == wanted.depth == nodes - 1
    assert all(torch.equal(getattr(found, name), getattr(wanted, name)) for name in ("parents", "depths", "ancestors"))
