"""Dynamic trees: which nodes are verified, under which parents, and as many as pay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hydra_core.base import Base
from hydra_core.decoding import Engine
from hydra_core.proposers import AdaptiveDrafter, NgramDrafter
from hydra_core.proposers.acceptance import MATCHES, AcceptanceEstimator, Floats, match_class
from hydra_core.proposers.candidate_tree import CandidateTrees, CopiedChains, merge_copied
from hydra_core.proposers.dynamic import BEAM, DEEPER_SHARE, WIDTH, DynamicTreeProposer
from hydra_core.proposers.node_budget import DynamicTrees, NodeSelection, prune, select_equal_budget, select_shared_budget
from hydra_core.sampling import Request
from hydra_core.sampling.sampler import Sampler, rank_scores
from hydra_core.tree.costs import StepCosts
from tests.trained import overfit_heads, random_prompts

GREEDY = np.array([False])
FREE = StepCosts({1: {1: 1.0, 32: 1.0}}, {1: {0: 0.0}})
DEAR = StepCosts({1: {1: 1.0, 32: 1000.0}}, {1: {0: 0.0}})


def candidates(nodes: list[tuple[int, int, float]]) -> CandidateTrees:
    """One row: (token, parent, chance of the path) of the nodes below the root."""
    tokens, parents, chances = (np.array([list(column)]) for column in zip(*nodes, strict=True))
    known = CandidateTrees.roots(np.array([9]))
    return known.extended(tokens, parents, np.zeros_like(tokens), chances, len(nodes))


def draft(known: CandidateTrees, seconds: Floats) -> tuple[DynamicTrees, NodeSelection]:
    selection = select_equal_budget(known, seconds)
    return prune(known, selection), selection


def seconds(*values: float) -> Floats:
    return np.array(values)


def test_the_most_probable_nodes_are_kept_with_their_parents() -> None:
    known = candidates([(5, 0, 0.6), (6, 0, 0.2), (7, 1, 0.5), (8, 1, 0.05), (4, 3, 0.4)])
    drafted, selection = draft(known, np.ones(4))
    assert drafted.tokens.tolist() == [[9, 5, 7, 4]] and drafted.trees.parents.tolist() == [[-1, 0, 1, 2]]
    assert selection.expected_tokens == pytest.approx(2.5) and selection.gain == pytest.approx(2.5)


def test_as_many_nodes_as_pay() -> None:
    known = candidates([(5, 0, 0.6), (6, 0, 0.2), (7, 1, 0.5), (8, 1, 0.05), (4, 3, 0.4)])
    assert draft(known, seconds(1.0, 1.1, 1.2, 1.3, 1.4, 1.5))[0].tokens.tolist() == [[9, 5, 6, 7, 4]]
    assert draft(known, seconds(1.0, 1.5, 2.2, 3.0, 4.0, 5.0))[0].tokens.tolist() == [[9, 5]]
    assert draft(known, seconds(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))[0].tokens.tolist() == [[9]]


def test_rows_share_the_number_of_nodes_and_nothing_else() -> None:
    one, other = candidates([(5, 0, 0.9), (6, 1, 0.8)]), candidates([(7, 0, 0.3), (8, 0, 0.2)])
    drafted, selection = draft(rows_of(one, other), np.ones(3))
    assert drafted.tokens.tolist() == [[9, 5, 6], [9, 7, 8]] and drafted.trees.parents.tolist() == [[-1, 0, 1], [-1, 0, 0]]
    assert selection.expected_tokens == pytest.approx(1 + (0.9 + 0.8 + 0.3 + 0.2) / 2)


def rows_of(*rows: CandidateTrees) -> CandidateTrees:
    return CandidateTrees(*(np.concatenate([getattr(row, name) for row in rows])
                        for name in ("tokens", "parents", "kinds", "path_probs")), depth=max(row.depth for row in rows))


def test_rows_get_as_many_nodes_as_each_is_worth() -> None:
    sure, unsure = candidates([(5, 0, 0.9), (6, 1, 0.8)]), candidates([(7, 0, 0.3), (8, 0, 0.2)])
    both = rows_of(sure, unsure)
    selection = select_shared_budget(both, seconds(1.0, 1.2, 1.4, 1.8, 2.2), 8)
    drafted = prune(both, selection)
    assert drafted.tokens.tolist() == [[9, 5, 6], [9, -1, -1]] and drafted.trees.parents.tolist()[0] == [-1, 0, 1]
    assert drafted.kinds.tolist() == [[-1, 0, 0], [-1, -1, -1]] and (drafted.trees.parents[1, 1:] == 0).all()
    assert selection.expected_tokens == pytest.approx((2 + 0.9 + 0.8) / 2) and selection.seconds == 1.4
    assert selection.gain == pytest.approx((2 + 0.9 + 0.8) / 1.4)
    nothing = select_shared_budget(both, seconds(1.0, 2.0, 3.0, 4.0, 5.0), 8)
    assert nothing.kept.tolist() == [[True, False, False]] * 2 and prune(both, nothing).tokens.tolist() == [[9], [9]]
    assert select_shared_budget(both, np.ones(5), 8).kept.all()


def test_no_row_gets_more_nodes_than_it_has_room_for() -> None:
    sure = candidates([(5, 0, 0.9), (6, 1, 0.9), (7, 2, 0.9), (8, 0, 0.05)])
    both = rows_of(sure, sure)
    assert select_shared_budget(both, np.ones(9), 3).kept.tolist() == [[True, True, True, False, False]] * 2  # ties keep parents
    assert select_shared_budget(both, np.ones(9), 1).kept.sum() == 2


def test_alone_a_row_gets_the_same_either_way() -> None:
    known = candidates([(5, 0, 0.6), (6, 0, 0.2), (7, 1, 0.5), (8, 1, 0.05), (4, 3, 0.4), (3, 0, 0.0)])
    for costs in (seconds(1.0, 1.1, 1.2, 1.3, 1.4, 1.5), seconds(1.0, 1.5, 2.2, 3.0, 4.0, 5.0), np.ones(7)):
        apart, together = select_shared_budget(known, costs, len(costs)), select_equal_budget(known, costs)
        assert apart.kept.tolist() == together.kept.tolist() and apart.gain == pytest.approx(together.gain)


def test_a_copied_chain_runs_along_what_stands_and_then_leaves_it() -> None:
    acceptance = AcceptanceEstimator(2, 1)
    kinds = acceptance.head_kinds(0, np.array([[0.4, 0.3]]), GREEDY)
    known = CandidateTrees.roots(np.array([9])).extended(np.array([[5, 6]]), np.array([[0, 0]]), kinds,
                                                       np.array([[0.4, 0.3]]), 1)
    with_copy = merge_copied(known, CopiedChains(np.array([[6, 7, 8]]), np.array([3])), acceptance, GREEDY)
    assert with_copy.tokens.tolist() == [[9, 5, 6, -1, 7, 8]]  # 6 stands already: no node of its own
    assert with_copy.parents.tolist()[0][4:] == [2, 4]
    chances = with_copy.path_probs[0].tolist()
    assert chances[1] == pytest.approx(0.4) and chances[2] > 0.8  # both agree: likelier than either alone
    assert chances[2] > chances[4] > chances[5] > 0 and chances[3] == 0
    assert with_copy.kinds[0, 3] == -1 and len(set(with_copy.kinds[0, [2, 4, 5]].tolist())) == 3


def test_a_short_chain_beside_a_long_one() -> None:
    acceptance = AcceptanceEstimator(0, 2)
    known = CandidateTrees.roots(np.array([9, 9]))
    sampled = np.array([False, True])
    copied = merge_copied(known, CopiedChains(np.array([[5, 6], [-1, -1]]), np.array([0, 0])), acceptance, sampled)
    drafted, _ = draft(copied, np.ones(3))
    assert drafted.tokens.tolist() == [[9, 5, 6], [9, -1, -1]] and drafted.trees.parents.tolist()[0] == [-1, 0, 1]


def test_acceptance_is_learned_by_kind_and_by_request() -> None:
    """What always comes true goes up, what never does goes down; a request's own luck moves its row alone."""
    acceptance = AcceptanceEstimator(1, 2)
    kinds = np.stack([acceptance.copied_kinds(2, np.array([match, match]), np.array([False, False]))[:, depth]
                         for depth, match in ((0, 0), (1, 2))], 1)
    before = acceptance.probabilities(kinds)
    assert bool((before[:, 1] > before[:, 0]).all())
    tried = np.ones((2, 2), dtype=np.bool_)
    for _ in range(60):
        acceptance.update(kinds, tried, np.array([[True, False], [True, False]]))
    after = acceptance.probabilities(kinds)
    assert bool((after[:, 0] > 0.7).all()) and bool((after[:, 1] < 0.3).all()) and bool((after <= 0.995).all())
    for _ in range(5):
        acceptance.update(kinds[:, :1], tried[:, :1], np.array([[True], [False]]))
    lucky, unlucky = acceptance.probabilities(kinds)[:, 0].tolist()
    assert lucky > unlucky
    acceptance.move(0, 1)
    assert acceptance.probabilities(kinds)[1, 0] == acceptance.probabilities(kinds)[0, 0]
    acceptance.reset(1)
    assert float(acceptance.accepted[1]) == float(acceptance.expected[1])


def test_every_kind_has_a_number_of_its_own() -> None:
    acceptance = AcceptanceEstimator(3, 1)
    seen = set()
    for sampled in (np.array([False]), np.array([True])):
        for depth in range(3):
            for p in (0.001, 0.3, 0.99):
                kind = acceptance.head_kinds(depth, np.array([[p]]), sampled)
                seen.add(kind.item())
                for match in range(MATCHES):
                    seen.add(("both", acceptance.agreed_kinds(kind[:, 0], np.array([match]), sampled).item())[1])
        for depth in range(4):
            seen |= {int(acceptance.copied_kinds(4, np.array([match]), sampled)[0, depth]) for match in range(MATCHES)}
    assert len(seen) == 2 * (3 * 3 + 3 * MATCHES + 4 * MATCHES) and max(seen) < len(acceptance.hits)
    assert [match_class(matched) for matched in (1, 2, 3, 5, 6, 31, 32)] == [0, 0, 1, 2, 3, 5, 6]


def test_nothing_is_drafted_where_it_does_not_pay(tiny_base: Base) -> None:
    prompts = random_prompts(4, seed=1)
    heads = overfit_heads(tiny_base, "hydra", prompts)
    requests = [Request(str(i), prompt, 30, stop_ids=()) for i, prompt in enumerate(prompts)]
    dear = Engine(tiny_base, AdaptiveDrafter(heads, NgramDrafter(), DEAR), max_batch_size=1).generate(requests)
    assert all(result.drafted == 0 and result.steps == 29 for result in dear)
    free = Engine(tiny_base, AdaptiveDrafter(heads, NgramDrafter(), FREE), max_batch_size=1).generate(requests)
    assert [r.token_ids for r in free] == [r.token_ids for r in dear]
    assert sum(r.steps for r in free) < 0.75 * sum(r.steps for r in dear)


def test_rows_of_long_texts_are_priced_as_such(tiny_base: Base) -> None:
    """Where only long contexts make nodes dear, short rows draft as before and long ones do not."""
    dear = StepCosts({1: {1: 1.0, 32: 1.0}}, {1: {0: 0.0}}, 16, {128: {1: {1: 1.0, 32: 900.0}}})
    proposer = DynamicTreeProposer(AdaptiveDrafter(None, NgramDrafter(), dear), 1, 240)
    proposer.admit(0, [5, 6, 7, 8] * 8)
    greedy = [Sampler(Request("greedy", (0,), 1), tiny_base.vocab_size)]
    sizes = {position: proposer.propose(torch.tensor([5]), [position], greedy).tokens.shape[1] for position in (12, 100, 200)}
    assert sizes[12] > 1 and sizes[100] == sizes[200] == 1
    assert {context for _, context in proposer._seconds} == {16, 128, 256}  # as few as there are lengths to tell apart


@pytest.mark.parametrize(("price", "least", "most"), [(0.0, 4, 4), (0.12, 1, 3)])
def test_only_paths_that_could_be_verified_are_drafted_on(tiny_base: Base, monkeypatch: pytest.MonkeyPatch, price: float,
                                                          least: int, most: int) -> None:
    """Where nodes cost nothing the likeliest four of a depth are drafted on, where they cost something only likely ones."""
    prompts = random_prompts(3, seed=1)
    heads = overfit_heads(tiny_base, "hydra", prompts)
    asked: list[tuple[int, int]] = []
    candidates = type(heads).candidates

    def counted(self: Any, depth: int, features: torch.Tensor, path: torch.Tensor, count: int) -> Any:
        asked.append((depth, len(path)))
        assert len(features) == len(path)
        return candidates(self, depth, features, path, count)

    monkeypatch.setattr(type(heads), "candidates", counted)
    costs = StepCosts({1: {1: 1.0, 32: 1.0 + 31 * price}, 3: {1: 1.0, 32: 1.0 + 93 * price}}, {1: {0: 0.0, 4: 0.0}})
    requests = [Request(str(i), prompt, 30, stop_ids=()) for i, prompt in enumerate(prompts)]
    Engine(tiny_base, AdaptiveDrafter(heads, None, costs), max_batch_size=3).generate(requests)
    first = [paths for depth, paths in asked if depth == 0]
    deeper = [paths for depth, paths in asked if depth == 1]
    assert max(first) == 3 and least <= max(deeper) / 3 <= most


def test_paths_of_a_row_share_its_noise() -> None:
    """Scores of paths, some rows having several: each as of its row alone."""
    logits, ids = torch.randn(5, 1, 40), torch.arange(100, 140)
    requests = [Request(str(row), (0,), 1, temperature=temperature, seed=row) for row, temperature in enumerate((0.0, 0.7, 1.3))]
    samplers, positions, whose = [Sampler(request, 200) for request in requests], [7, 8, 9], [0, 1, 1, 2, 2]
    together = rank_scores(logits, positions, samplers, ids, torch.tensor(whose))
    for path, row in enumerate(whose):
        alone = rank_scores(logits[path:path + 1], positions[row:row + 1], samplers[row:row + 1], ids)
        torch.testing.assert_close(together[path:path + 1], alone)


@pytest.mark.parametrize("nodes", [2, 4, 6, 8, 32])
def test_a_table_of_small_trees_does_not_keep_heads_from_drafting_deep(tiny_base: Base, nodes: int) -> None:
    """The price of a node is known from whatever trees were timed."""
    costs = StepCosts({1: {1: 1.0, nodes: 1.0001}}, {1: {0: 0.0003, 3: 0.0004}})
    heads = overfit_heads(tiny_base, "hydra", random_prompts(2, seed=1), tokens=16, steps=60)
    proposer = DynamicTreeProposer(AdaptiveDrafter(heads, None, costs), 1, 64)
    assert proposer._seconds_of_a_node([5]) == pytest.approx(0.0001 / (nodes - 1), rel=0.01)


def test_the_context_of_a_step_is_the_mean_of_its_rows() -> None:
    costs = StepCosts({1: {1: 1.0, 4: 1.0}}, {1: {0: 0.0}}, 16)
    proposer = DynamicTreeProposer(AdaptiveDrafter(None, NgramDrafter(), costs), 4, 240)
    assert [proposer._context(positions) for positions in ([100, 200, 300], [100, 100], [80, 90], [3, 5, 7], [0])] == [
        256, 128, 64, 16, 16]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("price", "depths"), [(0.99, 2), (1.01, 1)])
def test_a_depth_is_drafted_while_it_may_bring_its_price(tiny_base: Base, monkeypatch: pytest.MonkeyPatch, rows: int,
                                                         price: float, depths: int) -> None:
    """`BEAM` paths of each row, each as probable as `chance`: their sum, less what deeper nodes bring less often, is what the
    price of the next depth, in tokens at the speed without heads, must stay below. Token 0 is a token like any other."""
    chance, gain, drafting = 0.9, 5.0, 1.5
    heads = overfit_heads(tiny_base, "hydra", random_prompts(2, seed=1), tokens=16, steps=1)
    costs = StepCosts({1: {1: 1.0, 32: 1.0}}, {1: {0: 0.0, 4: 0.0}})
    proposer = DynamicTreeProposer(AdaptiveDrafter(heads, None, costs), rows, 64)
    asked: list[tuple[float, int]] = []

    def deeper_seconds(self: StepCosts, batch: float, depth: int) -> float:
        asked.append((batch, depth))
        return price * DEEPER_SHARE * chance * BEAM * rows / (drafting * gain) if depth == 1 else 1e9

    def found(self: Any, heads: Any, depth: int, features: Any, path: torch.Tensor, *_: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.tile(np.arange(WIDTH), (len(path), 1)), np.full((len(path), WIDTH), chance)

    monkeypatch.setattr(StepCosts, "deeper_seconds", deeper_seconds)
    monkeypatch.setattr(DynamicTreeProposer, "_candidates", found)
    monkeypatch.setattr(proposer.acceptance, "probabilities", lambda kinds: np.full(kinds.shape, chance))
    monkeypatch.setattr(type(proposer.calibrator), "drafting", drafting)
    samplers = [Sampler(Request("greedy", (0,), 1), tiny_base.vocab_size)] * rows
    trees, _ = proposer._expand(heads, CandidateTrees.roots(np.full(rows, 9)), [20] * rows, samplers, np.zeros(rows, bool), gain)
    assert asked[0] == (rows, 1) and len(asked) == depths
    assert trees.tokens.shape == (rows, 1 + WIDTH + (depths - 1) * BEAM * WIDTH)
