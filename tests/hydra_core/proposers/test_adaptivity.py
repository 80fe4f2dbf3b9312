"""What is learned while decoding never gets stuck: by a bad first sample, an old table, another situation or a million trials."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hydra_core.base import Base
from hydra_core.decoding import Engine
from hydra_core.proposers import AdaptiveDrafter, NgramDrafter
from hydra_core.proposers.acceptance import MOST_REQUEST_TRIALS, MOST_TRIALS, AcceptanceEstimator
from hydra_core.proposers.base import Accepted, StepTimes
from hydra_core.proposers.calibration import CostCalibrator
from hydra_core.proposers.dynamic import RETRY_STEPS, DynamicTreeProposer
from hydra_core.sampling import Request
from hydra_core.sampling.sampler import Sampler
from hydra_core.tree.costs import StepCosts
from tests.trained import overfit_heads, random_prompts

TABLE = {1: {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.7, 16: 2.5}}
NO_DRAFTS = {1: {0: 0.0}}
GREEDY = np.array([False])


@pytest.mark.parametrize("times", [5.0, 50.0, 1000.0])
def test_a_first_step_that_sets_things_up_does_not_count_whole(times: float) -> None:
    calibrator = CostCalibrator()
    calibrator.update(1, 0.02, 0.01, 0.03 * times)
    assert max(calibrator.factors(1)) < 1.6
    for _ in range(3):
        calibrator.update(1, 0.02, 0.01, 0.03)
    assert calibrator.factors(1) == pytest.approx((1.0, 1.0), rel=0.1)


def simulated(proposer: DynamicTreeProposer, seconds: Sequence[float], steps: int) -> list[float]:
    """Predicted over measured time of each of `steps` steps, in which every draft is accepted and time goes by a simulated clock:
    `seconds` of 1, 2, ... nodes."""
    found, sampler = [], [Sampler(Request("r", (0,), 1), 300)]
    for _ in range(steps):
        proposal = proposer.propose(torch.tensor([5]), [64], sampler)
        nodes = proposal.tokens.shape[1]
        proposer.feedback(Accepted(torch.arange(nodes)[None], torch.tensor([nodes]), [[5] * nodes]),
                          StepTimes(steps=1, verify=seconds[nodes - 1]))
        found.append(proposal.seconds / seconds[nodes - 1])
    return found


@pytest.mark.parametrize("factor", [0.02, 0.3, 4.0, 100.0])
def test_costs_timed_on_another_day_are_corrected_within_a_hundred_steps(factor: float) -> None:
    """Plain steps take `factor` times what the table says and nodes three times more in proportion; later nodes cost nothing."""
    proposer = DynamicTreeProposer(AdaptiveDrafter(None, NgramDrafter(), StepCosts(TABLE, NO_DRAFTS, 64)), 1, 200)
    proposer.admit(0, [5, 6, 7, 8] * 16)
    dear, free = [factor * (1 + 0.3 * node) for node in range(16)], [factor] * 16
    for seconds in (dear, free, dear):
        predicted = simulated(proposer, seconds, 100)
        assert all(0.85 < ratio < 1.15 for ratio in predicted[-5:]), predicted


def test_what_was_learned_from_a_million_trials_is_learned_anew() -> None:
    known = AcceptanceEstimator(1, 1)
    kinds = known.head_kinds(0, np.full((1, 50), 0.55), GREEDY)
    tried = np.ones((1, 50), dtype=np.bool_)

    def see(accepted: int, steps: int) -> float:
        for _ in range(steps):
            known.update(kinds, tried, np.arange(50)[None] < accepted)
        return float(known.hits[kinds[0, 0]] / known.trials[kinds[0, 0]])

    assert see(45, 20_000) == pytest.approx(0.9, abs=0.01)
    assert see(10, 100) < 0.35 and see(10, 100) == pytest.approx(0.2, abs=0.02)
    assert known.trials.max() <= MOST_TRIALS and known.expected.max() <= MOST_REQUEST_TRIALS
    assert 0 < known.probabilities(kinds)[0, 0] < 0.25


def test_a_sequence_whose_text_changes_is_seen_to(tiny_base: Base) -> None:
    """Its own ratio follows within some hundreds of drafts, however long it ran before."""
    known = AcceptanceEstimator(1, 2)
    kinds = known.head_kinds(0, np.full((2, 4), 0.55), np.array([False, False]))
    tried = np.ones((2, 4), dtype=np.bool_)
    for _ in range(5000):
        known.update(kinds, tried, np.ones((2, 4), dtype=np.bool_))
    for _ in range(200):  # now the first one's drafts fail; of the other one they go on being accepted
        known.update(kinds, tried, np.array([[False], [True]]) & tried)
    first, second = known.probabilities(kinds)[:, 0]
    assert first < 0.35 * second


def test_a_situation_in_which_heads_lost_is_tried_again_whatever_others_do(tiny_base: Base,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that repeats itself and text that does not take turns; heads lost in the former once."""
    prompts = random_prompts(2, seed=3)
    heads = overfit_heads(tiny_base, "hydra", prompts, tokens=16, steps=40)
    proposer = DynamicTreeProposer(AdaptiveDrafter(heads, NgramDrafter(), StepCosts(TABLE, {1: {0: 0.0, 3: 0.05}}, 64)), 1, 400)
    sampler, asked = [Sampler(Request("r", (0,), 1), tiny_base.vocab_size)], {True: 0, False: 0}
    where: dict[bool, tuple[int, int]] = {}
    original = DynamicTreeProposer._heads_pay

    def recorded(self: DynamicTreeProposer, situation: tuple[int, int]) -> bool:
        pays = original(self, situation)
        where[repeats] = situation
        asked[repeats] += pays
        return pays

    monkeypatch.setattr(DynamicTreeProposer, "_heads_pay", recorded)
    for turn in range(4 * RETRY_STEPS):
        repeats = turn % 2 == 0
        proposer.admit(0, [5, 6, 7, 8] * 12 if repeats else list(range(4, 52)))
        proposer._to_plain.clear()
        proposer.propose(torch.tensor([8 if repeats else 51]), [47], sampler)
        if turn == 1:
            assert where[True] != where[False]
            asked[True] = asked[False] = 0
            proposer._head_gains = {where[True]: 0.5, where[False]: 2.0}
    assert asked[False] > RETRY_STEPS and asked[True] >= 1


@pytest.mark.parametrize("ragged", [True, False])
def test_a_sequence_without_drafts_leaves_the_others_what_they_teach(ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    table = StepCosts({1: {1: 1.0, 16: 2.5}, 2: {1: 1.0, 16: 4.0}}, {1: {0: 0.0}, 2: {0: 0.0}}, 64)
    proposer = DynamicTreeProposer(AdaptiveDrafter(None, NgramDrafter(), table), 2, 200, ragged=ragged)
    samplers = [Sampler(Request(f"r{row}", (0,), 1), 300) for row in range(2)]
    predicted: list[float] = []
    monkeypatch.setattr(CostCalibrator, "update", lambda _, batch, plain, nodes, measured: predicted.append(nodes))

    def learned(kept: list[bool] | None) -> float:
        for row in range(2):
            proposer.admit(row, [5, 6, 7, 8] * 16)
        proposer._to_plain.clear()
        nodes = proposer.propose(torch.tensor([8, 8]), [64, 64], samplers).tokens.shape[1]
        assert nodes > 2
        before = proposer.acceptance.trials.sum()
        path = torch.arange(nodes).expand(2, nodes)
        proposer.feedback(Accepted(path, torch.tensor([nodes] * 2), [[5] * nodes] * 2), StepTimes(steps=1, verify=1.0), kept)
        return float(proposer.acceptance.trials.sum() - before) / (nodes - 1)

    assert [learned(None), learned([True, False]), learned([False, True])] == [2.0, 1.0, 1.0]
    if ragged:  # nodes that were dropped cost nothing; a base that pads computes them all the same
        assert 0 < predicted[1] < predicted[0]
    else:
        assert predicted[0] > 0 and predicted[1] > 0.5 * predicted[0]


def test_requests_that_ask_for_plain_decoding_do_not_stop_learning(tiny_base: Base) -> None:
    prompts = random_prompts(2, seed=5)
    engine = Engine(tiny_base, AdaptiveDrafter(overfit_heads(tiny_base, "hydra", prompts, tokens=24, steps=60), NgramDrafter(),
                                               StepCosts(TABLE, {1: {0: 0.0, 3: 0.05}}, 64)), max_batch_size=2)
    assert isinstance(engine.proposer, DynamicTreeProposer)
    before = engine.proposer.acceptance.trials.sum()
    results = engine.generate([Request("drafted", prompts[0], 24, stop_ids=()),
                               Request("plain", prompts[1], 24, stop_ids=(), speculate=False)])
    assert results[0].drafted > 0 == results[1].drafted
    assert engine.proposer.acceptance.trials.sum() > before and engine.proposer.calibrator.factors(2) != (1.0, 1.0)
