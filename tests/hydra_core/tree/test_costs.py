"""The cost model of a step: measured values at measured points, linear between and beyond them."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_core.tree.costs import StepCosts, interpolate, unmeasured_costs

BATCHES, NODES, CONTEXT, FAR = (1, 4, 16), (1, 2, 8, 32), 256, (2048, 8000)
rises = st.lists(st.floats(0.0, 5.0), min_size=200, max_size=200)


def growing(steps: list[float]) -> StepCosts:
    """Any costs that never fall in nodes, batch size or context, and where a node costs more in a larger batch."""
    rise = iter(steps)
    verify: dict[int, dict[int, float]] = {}
    plain, per_node = 1.0, dict.fromkeys(NODES[1:], 0.0)
    for batch in BATCHES:
        plain += next(rise)
        per_node = {nodes: cost + next(rise) for nodes, cost in per_node.items()}
        verify[batch] = dict(zip(NODES, itertools.accumulate(
            ((high - low) * per_node[high] for low, high in itertools.pairwise(NODES)), initial=plain), strict=True))
    above = {(batch, nodes): 0.0 for batch in BATCHES for nodes in (1, 8, 32)}
    far: dict[int, dict[int, dict[int, float]]] = {}
    for context in FAR:
        slope = next(rise)
        above = {(batch, nodes): more + batch * nodes * slope for (batch, nodes), more in above.items()}
        far[context] = {batch: {nodes: verify[batch][nodes] + above[batch, nodes] for nodes in (1, 8, 32)} for batch in (1, 4)}
    return StepCosts(verify, {1: {0: next(rise), 4: 6.0}, 16: {0: 6.0, 4: 12.0}}, CONTEXT, far)


@given(rises)
@settings(max_examples=50, deadline=None)
def test_measured_points_come_back(steps: list[float]) -> None:
    costs = growing(steps)
    tables = {CONTEXT: costs.verify, **costs.far}
    for context, table in tables.items():
        for batch, points in table.items():
            for nodes, seconds in points.items():
                assert costs.verify_seconds(batch, nodes, context) == pytest.approx(seconds)
    for batch, points in costs.draft.items():
        for depth, seconds in points.items():
            assert costs.draft_seconds(batch, depth) == pytest.approx(seconds)
            assert costs.seconds(batch, 8, depth, 2048) == pytest.approx(costs.verify_seconds(batch, 8, 2048) + seconds)
    assert StepCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs


@given(rises, st.integers(1, 100), st.integers(1, 64), st.integers(0, 20000), st.integers(0, 40), st.integers(0, 3000))
@settings(max_examples=200, deadline=None)
def test_more_never_costs_less(steps: list[float], batch: int, nodes: int, context: int, more: int, longer: int) -> None:
    """Between the measured points and beyond the last of each: rows, nodes and context."""
    costs = growing(steps)
    here = costs.verify_seconds(batch, nodes, context) * (1 - 1e-9)
    assert costs.verify_seconds(batch, nodes + more, context) >= here
    assert costs.verify_seconds(batch, nodes, context + longer) >= here
    assert costs.verify_seconds(batch + more, nodes, context) >= here
    curve = costs.verify_curve(batch, nodes, context)
    assert curve.tolist() == pytest.approx([costs.verify_seconds(batch, count, context) for count in range(1, nodes + 1)])


def test_context_is_laid_on_the_shape_of_short_ones() -> None:
    """A jump between two node counts that was measured at the short context alone appears at the long one too."""
    costs = StepCosts({1: {1: 10.0, 8: 12.0, 9: 20.0, 16: 21.0}}, {1: {0: 0.0}}, 256, {2048: {1: {1: 13.0, 16: 27.0}}})
    assert costs.verify_seconds(1, 9, 2048) - costs.verify_seconds(1, 8, 2048) == pytest.approx(8.2)
    assert costs.verify_seconds(1, 1, 1152) == pytest.approx(11.5)                 # linear in context
    assert costs.verify_seconds(1, 1, 3840) == pytest.approx(16.0)                 # and beyond
    assert costs.verify_seconds(1, 1, 8) == costs.verify_seconds(1, 1) == 10.0     # never less than at the shortest
    assert costs.verify_seconds(3, 1, 2048) == pytest.approx(10.0 + 3 * 3.0)       # rows that were not measured there


def test_costs_between_the_points() -> None:
    costs = StepCosts({1: {1: 1.0, 3: 2.0}, 3: {1: 2.0, 3: 4.0}}, {1: {0: 0.1, 2: 0.3}})
    assert costs.verify_seconds(2, 2) == pytest.approx(2.25) and costs.most_nodes == 3
    assert costs.seconds(1, 3, 1) == pytest.approx(2.2) and costs.seconds(1, 1, 0) == 1.0
    assert StepCosts.from_json(costs.to_json()) == costs


def test_nothing_measured_is_refused() -> None:
    known = {1: {1: 1.0}}
    for verify, draft, far, message in (({}, known, {}, "verify: no measured"), (known, {1: {}}, {}, "draft: no measured"),
                                        (known, known, {512: {}}, "far: no measured"), (known, known, {256: known}, "longer")):
        with pytest.raises(ValueError, match=message):
            StepCosts(verify, draft, 256, far)  # type: ignore[arg-type]


def test_costs_are_guessed_before_they_are_measured() -> None:
    guess, dice = unmeasured_costs(), random.Random(0)
    for _ in range(50):
        batch, nodes = dice.randint(1, 80), dice.randint(1, 40)
        assert 0 < guess.verify_seconds(batch, nodes) <= guess.verify_seconds(batch + 1, nodes + 1)


def test_interpolation_between_and_beyond_points() -> None:
    points = {1: 10.0, 4: 16.0, 8: 20.0}
    assert [interpolate(points, at) for at in (1, 2, 4, 6, 8, 12)] == [10, 12, 16, 18, 20, 24]
    assert interpolate({3: 5.0}, 9) == 5.0
    assert interpolate({1: 2.0, 2: 1.0}, 5) == 1.0  # noise must not promise ever cheaper steps
    with pytest.raises(ValueError, match="no measured points"):
        interpolate({}, 1)


def test_what_one_more_head_takes() -> None:
    """Between the depths that were measured, never less than nothing where noise made a deeper tree cheaper."""
    costs = StepCosts({1: {1: 1.0}}, {1: {0: 0.5, 1: 0.9, 3: 1.1, 4: 1.0}, 3: {0: 0.5, 1: 2.9, 3: 3.1, 4: 3.0}})
    assert [costs.deeper_seconds(1, depth) for depth in range(4)] == pytest.approx([0.4, 0.1, 0.1, 0.0])
    assert [costs.deeper_seconds(2, depth) for depth in range(4)] == pytest.approx([1.4, 0.1, 0.1, 0.0])
    assert sum(costs.deeper_seconds(1, depth) for depth in range(3)) == pytest.approx(
        costs.draft_seconds(1, 3) - costs.draft_seconds(1, 0))


def test_the_guess_is_a_plausible_machine() -> None:
    """In plain steps of one sequence: more of anything costs more, but a sequence costs less in a larger batch, and so does the
    average node in a larger tree, until the arithmetic units are busy."""
    costs = unmeasured_costs()
    assert costs.verify_seconds(1, 1) == 1.0 and costs.most_nodes == 32 and sorted(costs.verify) == [1, 4, 16, 64]
    for nodes in (1, 2, 8, 16, 32):
        seconds = [costs.verify_seconds(batch, nodes) for batch in (1, 4, 16, 64)]
        assert seconds == sorted(seconds) and all(low < high < 8 * low for low, high in itertools.pairwise(seconds))
    for batch in (1, 4, 16, 64):
        seconds = [costs.verify_seconds(batch, nodes) for nodes in range(1, 33)]
        assert all(low < high < 1.7 * low for low, high in itertools.pairwise(seconds))
        drafts = [costs.draft_seconds(batch, depth) for depth in range(5)]
        assert all(low < high for low, high in itertools.pairwise(drafts)) and drafts[4] < 2 * costs.verify_seconds(batch, 1)
        assert costs.seconds(batch, 1, 0) < costs.seconds(batch, 2, 1)
    assert {costs.draft_seconds(1, depth) for depth in (0, 4)} == {0.03, 0.2}
    assert costs.draft_seconds(16, 4) > costs.draft_seconds(4, 4) > costs.draft_seconds(1, 4)
