"""Walking rank tuples: by hand, and against the engine's own steps."""

from __future__ import annotations

import pytest
import torch

from hydra_core.base import Base
from hydra_core.decoding import Engine
from hydra_core.heads import DraftVocab, HeadsConfig, build_drafter
from hydra_core.sampling import Request
from hydra_core.training.packing import FeatureRow, pack_rows
from hydra_core.training.ranks import rank_rows
from hydra_core.tree import PLAIN, DraftTree, TreeSet
from hydra_core.tree.simulation import MISS, RankRows, Walk, accepted_lengths, walk, walk_steps


def test_accepted_length_is_the_longest_path_that_begins_the_tuple() -> None:
    tree = DraftTree(((0,), (1,), (0, 0), (0, 2), (0, 2, 1)))
    ranks = torch.tensor([[0, 2, 1], [0, 2, 0], [0, 1, 1], [1, 0, 0], [2, 0, 0], [MISS, 0, 0], [0, 0, 1]])
    assert accepted_lengths(tree, ranks).tolist() == [3, 2, 1, 1, 0, 0, 2]


def test_the_drawing_by_hand() -> None:
    """Row 1 is the module's drawing: 6 tokens after the first in 3 steps. Row 2 has one, row 3 none."""
    accepted = torch.tensor([2, 9, 9, 0, 1, 9, 4])
    assert walk_steps(accepted, (6, 1, 0)).tolist() == [3, 1, 0]


def test_the_last_step_may_be_cut_by_the_end_of_the_row() -> None:
    rows = RankRows(torch.zeros(5, 4, dtype=torch.int64), (5,))
    assert walk(DraftTree(((0,), (0, 0), (0, 0, 0))), rows) == Walk(steps=2, tokens=5)


def test_plain_is_one_token_a_step_and_counts_add_up() -> None:
    rows = RankRows(torch.zeros(7, 2, dtype=torch.int64), (3, 4))
    assert walk(PLAIN, rows).tokens_per_step == 1.0
    assert (walk(PLAIN, rows) + Walk(1, 8)).tokens_per_step == pytest.approx(15 / 8)
    assert Walk(0, 0).tokens_per_step == 1.0


def test_a_tree_deeper_than_the_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="deeper than the 1 heads"):
        walk(DraftTree(((0,), (0, 0))), RankRows(torch.zeros(2, 1, dtype=torch.int64), (2,)))


TREES = {
    "chain": DraftTree(((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0))),
    "bushy": DraftTree(((0,), (1,), (2,), (5,), (0, 0), (0, 1), (1, 0), (2, 3), (0, 0, 0), (0, 1, 2), (0, 0, 0, 1))),
    "plain": PLAIN,
}


@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
@pytest.mark.parametrize("tree", list(TREES))
def test_a_walk_is_the_engines_own_steps(tiny_base: Base, kind: str, tree: str) -> None:
    """Greedy fp32 rows, all ways a row can end: each row's steps, exactly, not just their mean."""
    base = tiny_base
    torch.manual_seed(0)
    requests = [Request(f"{n}", tuple(torch.randint(3, 200, (1 + 3 * n,)).tolist()), max_new_tokens=limit, stop_ids=())
                for n, limit in enumerate((24, 1, 17, 2, 40))]
    plain = Engine(base).generate(requests)
    stop = plain[0].token_ids[9]  # ends the first row, and any other that says it, before its limit
    requests = [Request(r.id, r.prompt_ids, r.max_new_tokens, stop_ids=(stop,)) for r in requests]

    torch.manual_seed(1)
    drafter = build_drafter(HeadsConfig(kind=kind), base.vocabulary, DraftVocab.rank(torch.ones(base.vocab_size), 0))  # type: ignore[arg-type]
    _memorise(base, drafter, plain)
    drafter.eval().requires_grad_(False)
    results = Engine(base, drafter, TreeSet({1: TREES[tree]}), max_batch_size=3).generate(requests)

    features = base.hidden_states([[*r.prompt_ids, *r.token_ids] for r in results])
    rows = [FeatureRow(torch.tensor([*r.prompt_ids, *r.token_ids]), len(r.prompt_ids), hidden.clone())
            for r, hidden in zip(results, features, strict=True)]
    found = rank_rows(drafter, pack_rows(rows, 64))
    steps = walk_steps(accepted_lengths(TREES[tree], found.ranks), found.positions)
    assert steps.tolist() == [result.steps for result in results]
    if tree != "plain":
        assert sum(result.accepted for result in results) > 5  # otherwise nothing but misses was compared


def _memorise(base: Base, drafter, results) -> None:  # type: ignore[no-untyped-def]
    """A few dozen steps on the very answers, so that drafts of every depth are accepted."""
    from hydra_core.training.model import HeadTraining

    model = HeadTraining(drafter, base.vocabulary)
    sequences = [[*r.prompt_ids, *r.token_ids] for r in results]
    rows = [FeatureRow(torch.tensor(ids), len(r.prompt_ids), hidden.clone())
            for ids, r, hidden in zip(sequences, results, base.hidden_states(sequences), strict=True)]
    packed = pack_rows(rows, 64)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        model(packed, torch.full((4,), 80.0))[0].backward()
        optimizer.step()


def test_rows_of_several_parts_stay_rows() -> None:
    """A tuple looks ahead within its own row alone, so where rows begin must not move."""
    first = RankRows(torch.tensor([[0, 1], [2, 3], [0, 0]]), (2, 1))
    second = RankRows(torch.tensor([[1, 1], [0, 2]]), (2,))
    both = RankRows.concatenate(part for part in (first, second))
    assert both.positions == (2, 1, 2) and both.heads == 2
    assert both.ranks.tolist() == [[0, 1], [2, 3], [0, 0], [1, 1], [0, 2]]
    tree = DraftTree(((0,), (0, 1)))
    assert walk(tree, both) == walk(tree, first) + walk(tree, second) == Walk(4, 5)
    with pytest.raises(ValueError, match="no rank rows"):
        RankRows.concatenate([])
