"""What steps take relative to what a table predicts: learned in proportion, quickly, and not from a single outlier."""

from __future__ import annotations

import random

import pytest
import torch

from hydra_core.base import Base
from hydra_core.proposers import AdaptiveDrafter, NgramDrafter
from hydra_core.proposers.base import Accepted, StepTimes
from hydra_core.proposers.calibration import APART, CostCalibrator
from hydra_core.proposers.dynamic import DynamicTreeProposer
from hydra_core.sampling.request import Request
from hydra_core.sampling.sampler import Sampler
from hydra_core.tree.costs import StepCosts


def taught(plain: float, nodes: float, steps: int, noise: float = 0.1, seed: int = 0) -> CostCalibrator:
    """After steps of four sequences, each with nodes that cost 0 to 1.5 plain steps; `plain`, `nodes`: measured / predicted."""
    dice, calibrator = random.Random(seed), CostCalibrator()
    for _ in range(steps):
        share = dice.choice((0.0, 0.2, 0.5, 1.5))
        calibrator.update(4, 0.02, 0.02 * share, 0.02 * (plain + nodes * share) * dice.uniform(1 - noise, 1 + noise))
    return calibrator


@pytest.mark.parametrize(("plain", "nodes"), [(1.0, 1.0), (2.0, 2.0), (1.2, 3.0), (0.8, 0.4), (900.0, 2000.0)])
def test_both_factors_are_found(plain: float, nodes: float) -> None:
    found = taught(plain, nodes, 150).factors(4)
    assert found[0] == pytest.approx(plain, rel=0.1) and found[1] == pytest.approx(nodes, rel=0.3)


def test_until_sizes_tell_them_apart_they_move_together() -> None:
    calibrator = CostCalibrator()
    assert calibrator.factors(1) == (1.0, 1.0)
    for _ in range(100):
        calibrator.update(4, 0.02, 0.01, 0.06)
    plain, nodes = calibrator.factors(4)
    assert plain == pytest.approx(2.0, rel=0.02) and nodes == pytest.approx(2.0, rel=0.02)
    for _ in range(100):
        calibrator.update(4, 0.02, 0.01, 0.03)
    plain, nodes = calibrator.factors(4)
    assert plain == pytest.approx(1.0, rel=0.1) and nodes == pytest.approx(1.0, rel=0.3)


def test_what_happens_once_changes_little() -> None:
    calibrator = taught(1.0, 1.0, 80)
    calibrator.update(4, 0.02, 0.01, 60.0)
    assert all(value < 1.25 for value in calibrator.factors(4))
    for _ in range(50):
        calibrator.update_drafting(0.01, 0.02)
    calibrator.update_drafting(0.01, 60.0)
    assert 1.9 < calibrator.drafting < 2.3


def test_sizes_of_batches_learn_apart_and_new_ones_begin_with_what_is_known() -> None:
    calibrator = taught(2.0, 2.0, 80)
    assert calibrator.factors(5) == calibrator.factors(4) and calibrator.factors(64) == pytest.approx((2.0, 2.0), rel=0.2)
    assert calibrator.drafting == calibrator.factors(64)[0]
    before = calibrator.factors(4)
    for _ in range(6):
        calibrator.update(64, 1.0, 0.0, 0.5)
    assert calibrator.factors(64)[0] == pytest.approx(0.5, rel=0.1) and calibrator.factors(4) == before


def test_factors_stay_within_reason_whatever_comes() -> None:
    dice, calibrator = random.Random(3), CostCalibrator()
    for _ in range(3000):
        calibrator.update(1, 10 ** dice.uniform(-4, 0), dice.choice((0.0, 10 ** dice.uniform(-6, 1))), 10 ** dice.uniform(-5, 2))
        plain, nodes = calibrator.factors(1)
        assert 0 < plain < 1e8 and plain / APART * 0.999 <= nodes <= plain * APART * 1.001


@pytest.mark.parametrize("ragged", [True, False])
def test_nodes_that_turn_out_dear_are_no_longer_drafted(tiny_base: Base, ragged: bool) -> None:
    """The table says that a node costs half a step; here it costs two, and later half a step again. There is always text to
    copy, and the time of a plain step is learned all the same."""
    costs = StepCosts({1: {1: 1.0, 16: 8.5}}, {1: {0: 0.0}}, 16)
    proposer = DynamicTreeProposer(AdaptiveDrafter(None, NgramDrafter(), costs), 1, 400, ragged=ragged)
    proposer.admit(0, [5, 6, 7, 8] * 8)
    greedy = [Sampler(Request("greedy", (0,), 1), tiny_base.vocab_size)]

    def sizes(price: float) -> float:
        """Mean nodes of the last steps."""
        seen = []
        for _ in range(900):
            nodes = proposer.propose(torch.tensor([5]), [12], greedy).tokens.shape[1]
            everything = Accepted(torch.arange(nodes)[None], torch.tensor([nodes]), [[5] * nodes])
            proposer.feedback(everything, StepTimes(steps=1, verify=0.01 * (1 + price * (nodes - 1))))
            seen.append(nodes)
        return sum(seen[-100:]) / 100

    assert sizes(0.5) > 4
    assert sizes(2.0) < 3
    assert sizes(0.5) > 4


@pytest.mark.parametrize("times", [5, 50, 1000])
def test_a_first_draft_that_sets_up_libraries_does_not_count_whole(times: int) -> None:
    calibrator = CostCalibrator()
    calibrator.update_drafting(0.002, 0.002 * times)
    for _ in range(5):
        calibrator.update_drafting(0.002, 0.002)
    assert calibrator.drafting < 1.3


@pytest.mark.parametrize("true", [0.3, 3.0])
def test_drafting_that_takes_another_time_than_the_table_says_is_found(true: float) -> None:
    calibrator = CostCalibrator()
    for _ in range(40):
        calibrator.update_drafting(0.002, 0.002 * true)
    assert calibrator.drafting == pytest.approx(true, rel=0.1)
