"""What proposers learn and expect, against the same written plainly: acceptance by kind, merged candidates, step times."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from hydra_core.proposers import calibration
from hydra_core.proposers.acceptance import (
    BIN_EDGES,
    COPIED_PRIOR,
    DEEP,
    MATCH_EDGES,
    MATCHES,
    PRIOR_TRIALS,
    REQUEST_TRIALS,
    SAMPLED_SHARE,
    AcceptanceEstimator,
    match_class,
)
from hydra_core.proposers.calibration import CostCalibrator
from hydra_core.proposers.candidate_tree import CandidateTrees, CopiedChains, merge_copied

GREEDY, DRAWN = np.array([False]), np.array([True])


def centre(probability: float) -> float:
    """The middle of the bin of a head's probability."""
    edges = (0.0, *BIN_EDGES, 1.0)
    place = sum(probability > edge for edge in BIN_EDGES)
    return (edges[place] + edges[place + 1]) / 2


@pytest.mark.parametrize("sampled", [GREEDY, DRAWN], ids=["greedy", "sampled"])
def test_what_is_assumed_before_anything_is_learned(sampled: np.ndarray) -> None:
    """A head's draft by the middle of its bin, copied text by the class of its match, both together by either being right."""
    made = AcceptanceEstimator(2, 1)
    for probability in (0.001, 0.005, 0.0051, 0.3, 0.31, 0.97, 1.0):
        for depth in range(2):
            kinds = made.head_kinds(depth, np.array([[probability]]), sampled)
            assert made.probabilities(kinds)[0, 0] == pytest.approx(min(centre(probability), 0.995))
            for match in range(MATCHES):
                copied = COPIED_PRIOR[match] * (SAMPLED_SHARE if sampled[0] else 1.0)
                both = made.agreed_kinds(kinds, np.array([[match]]), sampled[:, None])
                either = 1 - (1 - COPIED_PRIOR[match]) * (1 - centre(probability))
                assert made.probabilities(both)[0, 0] == pytest.approx(min(either, 0.995))
                assert made.probabilities(made.copied_kinds(9, np.array([match]),
                                                            sampled))[0].tolist() == pytest.approx([copied] * 9)


def test_kinds_of_copied_text_by_depth() -> None:
    made = AcceptanceEstimator(3, 1)
    kinds = made.copied_kinds(DEEP + 3, np.array([2]), GREEDY)[0].tolist()
    assert len(set(kinds)) == DEEP and kinds[DEEP - 1:] == [kinds[DEEP - 1]] * 4  # deep ones share theirs


@pytest.mark.parametrize(("matched", "wanted"), [(0, 0), (2, 0), (3, 1), (4, 2), (5, 2), (6, 3), (8, 3), (9, 4), (15, 4),
                                                 (16, 5), (31, 5),
                                                 (32, 6)])
def test_classes_of_matches(matched: int, wanted: int) -> None:
    assert match_class(matched) == wanted and len(MATCH_EDGES) + 1 == MATCHES == len(COPIED_PRIOR)


def test_learned_as_counts_over_a_prior() -> None:
    """Hits and trials by kind, on top of a prior; and for each row how lucky it is relative to what is expected."""
    dice, made = np.random.default_rng(0), AcceptanceEstimator(2, 3)
    drafts = made.head_kinds(0, np.array([[0.3, 0.9], [0.3, 0.02], [0.6, 0.6]]), np.array([False, True, False]))
    kinds = np.concatenate((drafts, np.full((3, 1), -1)), 1)
    used = sorted({int(kind) for kind in kinds.ravel() if kind >= 0})
    trials = dict.fromkeys(used, PRIOR_TRIALS)
    hits = {kind: float(made.probabilities(np.array([[kind]]))[0, 0]) * PRIOR_TRIALS for kind in used}
    accepted, expected = [REQUEST_TRIALS] * 3, [REQUEST_TRIALS] * 3
    for _ in range(40):
        tried = (dice.random((3, 3)) < 0.7) & (kinds >= 0)
        right = tried & (dice.random((3, 3)) < 0.6)
        values = {kind: hits[kind] / trials[kind] for kind in used}
        for row in range(3):
            accepted[row] += int(right[row].sum())
            expected[row] += sum(values[int(kind)] for kind, was in zip(kinds[row], tried[row], strict=True) if was)
        for kind, was, came in zip(kinds.ravel(), tried.ravel(), right.ravel(), strict=True):
            if was:
                trials[int(kind)] += 1
                hits[int(kind)] += came
        made.update(kinds, tried, right)
        found = made.probabilities(kinds.clip(0))
        for row in range(3):
            for place in range(2):
                kind = int(kinds[row, place])
                wanted = min(hits[kind] / trials[kind] * accepted[row] / expected[row], 0.995)
                assert found[row, place] == pytest.approx(wanted)
    assert max(accepted) > 20
    made.move(0, 2)
    assert (made.accepted[2], made.expected[2]) == pytest.approx((accepted[0], expected[0]))
    made.reset(0)
    assert (made.accepted[0], made.expected[0]) == (REQUEST_TRIALS, REQUEST_TRIALS)
    assert (made.accepted[1], made.expected[1]) == pytest.approx((accepted[1], expected[1]))


def paths_of(trees: CandidateTrees, row: int) -> dict[tuple[int, ...], tuple[float, int]]:
    """Tokens from the root down -> probability and kind, of the places that are not empty."""
    paths: dict[int, tuple[int, ...]] = {0: ()}
    found: dict[tuple[int, ...], tuple[float, int]] = {}
    for node in range(1, trees.tokens.shape[1]):
        paths[node] = (*paths[int(trees.parents[row, node])], int(trees.tokens[row, node]))
        if trees.tokens[row, node] >= 0:
            assert paths[node] not in found, "the same token after the same parent is one node"
            found[paths[node]] = float(trees.path_probs[row, node]), int(trees.kinds[row, node])
    return found


def with_copied(made: AcceptanceEstimator, known: dict[tuple[int, ...], tuple[float, int]], chain: list[int], match: int,
                sampled: np.ndarray, ratio: float) -> dict[tuple[int, ...], tuple[float, int]]:
    """The same nodes with a copied chain in them, token by token."""
    found, path, chance = dict(known), tuple[int, ...](), 1.0
    kinds = made.copied_kinds(len(chain), np.array([match]), sampled)[0].tolist()

    def learned(kind: int) -> float:
        return min(float(made.hits[kind] / made.trials[kind]) * ratio, 0.995)

    for token, kind in zip(chain, kinds, strict=True):
        if token < 0:
            break
        path = (*path, token)
        if path in known:
            before, own = known[path]
            kind = int(made.agreed_kinds(np.array([[own]]), np.array([[match]]), sampled[:, None])[0, 0])
            chance = max(chance * learned(kind), before)
        else:
            chance *= learned(kind)
        found[path] = chance, kind
    return found


def test_copied_chains_go_into_the_tree_of_the_heads() -> None:
    dice, drawing, met, left = random.Random(1), np.random.default_rng(1), 0, 0
    made = AcceptanceEstimator(3, 4)
    made.accepted += drawing.uniform(0, 6, 4)
    for _ in range(150):
        batch, sampled = 4, drawing.random(4) < 0.5
        trees = CandidateTrees.roots(drawing.integers(100, 200, batch))
        for depth in range(dice.randint(0, 3)):
            width = dice.randint(1, 3)
            first = trees.tokens.shape[1]
            real = [[node for node in range(first) if row[node] >= 0] for row in trees.tokens]
            above = np.array([[dice.choice(nodes[-3:])] * width for nodes in real])
            tokens = np.stack([drawing.permutation(4)[:width] for _ in range(batch)])
            chances = np.take_along_axis(trees.path_probs, above, 1) * drawing.uniform(0.1, 1.0, (batch, width))
            kinds = made.head_kinds(depth, drawing.random((batch, width)), sampled)
            known = [set(zip(trees.parents[row].tolist(), trees.tokens[row].tolist(), strict=True)) for row in range(batch)]
            twice = np.array([[(int(above[row, 0]), int(token)) in known[row] for token in tokens[row]] for row in range(batch)])
            tokens, chances, kinds = (np.where(twice, empty, part) for part, empty in ((tokens, -1), (chances, 0.0), (kinds, -1)))
            trees = trees.extended(tokens, above, kinds, chances, trees.depth + 1)
        length, matches = dice.randint(1, 5), drawing.integers(0, MATCHES, batch)
        chains = drawing.integers(0, 4, (batch, length))
        chains[drawing.random(batch) < 0.2] = -1
        before = [paths_of(trees, row) for row in range(batch)]
        merged = merge_copied(trees, CopiedChains(chains, matches), made, sampled)
        assert merged.depth == max(trees.depth, length)
        for row in range(batch):
            ratio = float(made.accepted[row] / made.expected[row])
            wanted = with_copied(made, before[row], chains[row].tolist(), int(matches[row]), sampled[row:row + 1], ratio)
            found = paths_of(merged, row)
            assert found.keys() == wanted.keys()
            for path, (chance, kind) in wanted.items():
                assert (found[path][0], found[path][1]) == (pytest.approx(chance), kind), path
            met += any(path in before[row] for path in wanted if path == tuple(chains[row][:len(path)].tolist()))
            left += bool(before[row]) and len(wanted) > len(before[row])
    assert met > 40 and left > 100


def test_step_times_are_learned_by_a_kalman_filter() -> None:
    """Two factors with matrices: prediction, surprise that is cut off, gain, and the limits between the two factors. A surprise
    that is cut off makes nothing more certain."""
    dice, made = random.Random(4), CostCalibrator()
    c = calibration
    state = np.array([1.0, 1.0])
    one = np.array([[1.0, c.CORRELATION], [c.CORRELATION, 1.0]])
    spread = one * c.INITIAL_DEVIATION ** 2
    plain, nodes, measured = 0.02, 0.0, 0.05
    made.update(4, plain, nodes, measured)
    for number in range(400):
        spread = spread + one * (c.DRIFT * state[0]) ** 2
        state[1] += c.RETURN * (state[0] - state[1])
        seen = np.array([1.0, nodes / plain])
        expected = float(seen @ state)
        surprise = float(np.clip(measured / plain - expected, -c.LARGEST_SURPRISE * expected, c.LARGEST_SURPRISE * expected))
        total = float(seen @ spread @ seen) + (c.NOISE * expected) ** 2
        gain = spread @ seen / total
        before = state.copy()
        state = state + gain * surprise
        state[0] = max(state[0], 0.1 * before[0])
        state[1] = np.clip(state[1], state[0] / c.APART, state[0] * c.APART)
        if abs(measured / plain - expected) <= c.LARGEST_SURPRISE * expected:
            spread = spread - np.outer(gain, gain) * total
        assert made.factors(4) == pytest.approx(tuple(state), rel=1e-9), number
        plain, nodes = dice.uniform(0.01, 0.05), dice.choice((0.0, 0.005, 0.1))
        measured = (plain * dice.choice((1.0, 1.2, 4.0)) + nodes * dice.choice((0.2, 1.0, 6.0))) * dice.uniform(0.8, 1.3)
        made.update(4, plain, nodes, measured)


def test_drafting_times_are_learned_by_a_kalman_filter() -> None:
    dice, made, c = random.Random(5), CostCalibrator(), calibration
    factor, variance = 1.0, c.INITIAL_DEVIATION ** 2
    for _ in range(200):
        predicted = dice.uniform(0.001, 0.01)
        measured = predicted * dice.choice((0.2, 1.0, 1.4, 30.0))
        made.update_drafting(predicted, measured)
        variance += c.DRIFT ** 2
        gain = variance / (variance + c.NOISE ** 2)
        factor *= 1 + gain * float(np.clip(measured / predicted / factor - 1, -c.LARGEST_SURPRISE, c.LARGEST_SURPRISE))
        variance *= 1 - gain
        assert made.drafting == pytest.approx(factor, rel=1e-9)


def test_batches_of_one_power_of_two_learn_together() -> None:
    made: Any = CostCalibrator()
    for _ in range(12):
        made.update(4, 1.0, 1.0, 6.0)
    learned = made.factors(4)
    assert learned == pytest.approx((3.0, 3.0), rel=0.02) and made.factors(5) == made.factors(7) == learned
    for _ in range(12):
        made.update(8, 1.0, 0.0, 2.0)
    latest = made.factors(15)
    assert latest[0] == pytest.approx(2.0, rel=0.02) and made.factors(4) == learned
    assert made.factors(100) == (latest[0], latest[0]) and made.drafting == latest[0]  # the latest that was learned
