"""Trees from joint rank statistics, and the choice of size by measured cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_core.tree import PLAIN, DraftTree
from hydra_core.tree.costs import StepCosts
from hydra_core.tree.search import (
    Choice,
    best_choice,
    best_of_each_size,
    candidate_trees,
    nested_trees,
    rank_paths,
    reference_tokens_per_step,
    score_trees,
    typical_trees,
)
from hydra_core.tree.simulation import MISS, RankRows, accepted_lengths, walk

tuples = st.lists(st.tuples(*[st.sampled_from([0, 0, 0, 1, 1, 2, 3, MISS])] * 3), min_size=1, max_size=60)


def rows_of(ranks: list[tuple[int, ...]]) -> RankRows:
    return RankRows(torch.tensor(ranks), (len(ranks),))


@given(tuples, st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_trees_are_closed_nested_and_the_best_of_their_size(ranks: list[tuple[int, ...]], nodes: int) -> None:
    rows = rows_of(ranks)
    trees = nested_trees(rows, nodes)  # Tree itself refuses a path without its parent
    assert trees[0] == PLAIN and len(trees) <= nodes
    for smaller, larger in itertools.pairwise(trees):
        assert larger.size == smaller.size + 1 and set(smaller.paths) < set(larger.paths)
        assert accepted_lengths(larger, rows.ranks).sum() > accepted_lengths(smaller, rows.ranks).sum()


def test_no_other_tree_of_that_size_accepts_more_over_all_positions() -> None:
    """Brute force over every tree of 4 nodes with ranks below 3 and depth up to 3."""
    torch.manual_seed(0)
    ranks = torch.randint(0, 4, (200, 3)) * torch.randint(0, 2, (200, 3))
    rows = RankRows(ranks, (200,))
    paths = [path for depth in (1, 2, 3) for path in itertools.product(range(3), repeat=depth)]
    best = 0
    for chosen in itertools.combinations(paths, 3):
        if all(not path[:-1] or path[:-1] in chosen for path in chosen):
            best = max(best, int(accepted_lengths(DraftTree(chosen), ranks).sum()))
    assert int(accepted_lengths(DraftTree(rank_paths(rows, 3)), ranks).sum()) == best


def test_joint_counts_not_products() -> None:
    """Head 1 is right just when head 0's second choice is: the product of rates would put (0, 0) before (1, 0)."""
    ranks = [(0, 3)] * 6 + [(1, 0)] * 4
    assert rank_paths(rows_of(ranks), 3, max_rank=3) == ((0,), (1,), (1, 0))


def test_ties_keep_the_parent() -> None:
    assert rank_paths(rows_of([(1, 1, 1)] * 3), 2) == ((1,), (1, 1))


def choices(verify: dict[int, float], draft: dict[int, float]) -> list[Choice]:
    rows = RankRows(torch.zeros(30, 3, dtype=torch.int64), (10, 10, 10))
    return score_trees(nested_trees(rows, 4), rows, StepCosts({2: verify}, {2: draft}), [2])[2]


def test_the_tree_follows_the_cost() -> None:
    cheap = best_choice(choices({1: 1.0, 4: 1.1}, {0: 0.0, 3: 0.1}))
    assert cheap.tree == DraftTree(((0,), (0, 0), (0, 0, 0)))
    rows = RankRows(torch.zeros(30, 3, dtype=torch.int64), (10, 10, 10))
    assert cheap.tokens_per_step == walk(cheap.tree, rows).tokens_per_step
    assert cheap.gain == pytest.approx(cheap.tokens_per_step / 1.2)
    assert cheap.tokens_per_second == pytest.approx(2 * cheap.tokens_per_step / 1.2)
    dear = best_choice(choices({1: 1.0, 2: 9.0, 4: 20.0}, {0: 0.0, 3: 0.1}))
    assert dear.tree == PLAIN and dear.gain == 1.0 and dear.tokens_per_step == 1.0
    drafting = best_choice(choices({1: 1.0, 4: 1.1}, {0: 5.0, 3: 9.0}))
    assert drafting.tree == PLAIN  # drafting alone may cost more than it saves


@given(tuples, st.lists(st.floats(0.0, 0.3), min_size=12, max_size=12), st.floats(0.0, 0.4))
@settings(max_examples=60, deadline=None)
def test_the_choice_is_the_best_of_all_that_were_scored(ranks: list[tuple[int, ...]], rises: list[float], draft: float) -> None:
    """Brute force over the nested trees at every batch size, 64 included: tokens of a walk over measured seconds."""
    rows = rows_of(ranks)
    ramp = [1.0, 1.0 + rises[0], 1.0 + rises[0] + rises[1], 1.0 + 4 * max(rises)]
    costs = StepCosts({batch: dict(zip((1, 2, 4, 8), (batch ** 0.3 * (1 + batch / 16 * (value - 1)) for value in ramp),
                                       strict=True)) for batch in (1, 4, 16, 64)}, {1: {1: draft, 3: 2 * draft}})
    trees = nested_trees(rows, 8)
    for batch in (1, 4, 16, 64):
        best = best_choice(score_trees(trees, rows, costs, [batch])[batch])
        speeds = [(walk(tree, rows).tokens_per_step if tree.paths else 1.0) * batch / costs.seconds(batch, tree.size, tree.depth)
                  for tree in trees]
        assert best.tokens_per_second == max(speeds) and best.tree == trees[speeds.index(max(speeds))]
        assert best.gain >= 1.0 and (best.tree == PLAIN) == (best.gain == 1.0)


def test_trees_shrink_with_the_batch_down_to_plain() -> None:
    rows = RankRows(torch.zeros(30, 3, dtype=torch.int64), (10, 10, 10))
    costs = StepCosts({batch: {nodes: 1.0 + batch * nodes / 40 for nodes in (1, 2, 4)} for batch in (1, 4, 16, 64)},
                      {1: {1: 0.1, 3: 0.3}, 64: {1: 0.4, 3: 1.2}})
    scored = score_trees(nested_trees(rows, 4), rows, costs, (1, 4, 16, 64))
    sizes = [best_choice(choices).tree.size for choices in scored.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 4
    dear = StepCosts({1: {1: 1.0, 4: 2.0}, 64: {1: 3.0, 4: 24.0}}, {1: {1: 0.1, 3: 0.3}})
    assert best_choice(score_trees(nested_trees(rows, 4), rows, dear, [64])[64]).tree == PLAIN


@given(tuples, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_one_tree_of_each_size_and_none_better(ranks: list[tuple[int, ...]], nodes: int) -> None:
    rows = rows_of(ranks)
    costs = StepCosts({1: {1: 1.0, 12: 1.4}}, {1: {0: 0.0, 1: 0.1, 2: 0.5, 3: 2.0}})
    trees = candidate_trees(rows, nodes)
    assert trees[0] == PLAIN and len(set(trees)) == len(trees) and set(nested_trees(rows, nodes)) <= set(trees)
    scored = score_trees(trees, rows, costs, [1])[1]
    best = best_of_each_size(scored)
    assert [choice.tree.size for choice in best] == list(range(1, len(best) + 1))
    for choice in best:
        assert choice.tokens_per_second == max(one.tokens_per_second for one in scored if one.tree.size == choice.tree.size)
    assert best_choice(best).tokens_per_second == best_choice(scored).tokens_per_second


def test_a_depth_is_timed_with_a_tree_of_about_sixteen_nodes() -> None:
    torch.manual_seed(0)
    rows = RankRows(torch.randint(0, 4, (300, 3)), (300,))
    found = typical_trees(candidate_trees(rows, 48))
    assert list(found) == [1, 2, 3] and all(tree.depth == depth for depth, tree in found.items())
    deep = min(tree.size for tree in candidate_trees(rows, 48) if tree.depth == 3)
    assert deep > 16  # no smaller one is so deep, and there are but four first tokens
    assert {depth: tree.size for depth, tree in found.items()} == {1: 5, 2: 16, 3: deep}
    assert typical_trees([PLAIN]) == {}


def test_where_a_deep_head_is_dear_nodes_go_to_the_shallow_ones() -> None:
    """With three nodes, (0, 0) is right more often than (1,), but costs a second head."""
    rows = rows_of([(0, 0)] * 30 + [(1, 5)] * 6 + [(5, 5)] * 2)
    trees = candidate_trees(rows, 3)
    assert nested_trees(rows, 3)[-1] == DraftTree(((0,), (0, 0)))
    for second, wanted in ((0.1, ((0,), (0, 0))), (0.9, ((0,), (1,)))):
        costs = StepCosts({1: {1: 1.0, 3: 1.1}}, {1: {0: 0.0, 1: 0.1, 2: second}})
        assert best_of_each_size(score_trees(trees, rows, costs, [1])[1])[2].tree == DraftTree(wanted)


def test_a_tie_takes_the_smaller_tree() -> None:
    tied = [Choice(1, PLAIN, 1.0, 1.0, 1.0), Choice(1, DraftTree(((0,),)), 2.0, 2.0, 1.0)]
    assert best_choice(tied).tree == PLAIN
    with pytest.raises(ValueError, match="plain"):
        best_choice(tied[1:])


def test_reference_score_grows_with_better_heads() -> None:
    good, bad = rows_of([(0, 0, 1)] * 40), rows_of([(0, MISS, MISS)] * 20 + [(MISS, 0, 0)] * 20)
    assert reference_tokens_per_step(good) > reference_tokens_per_step(bad) > 1.0
