"""Figures of a bench against scipy, on questions whose speeds are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipelines.bench.plan import Row
from pipelines.bench.report import summarise


def rows_of(plain: np.ndarray, ours: np.ndarray) -> list[Row]:
    """One answer of 10 tokens for each question, in the order in which a kill and a second start might leave them."""
    made = [Row(round=0, question=f"q{i}", category="all", method=method, token_ids=(1,) * 10, steps=9, prefill_seconds=2 / rate,
                decode_seconds=8 / rate)
            for method, rates in (("plain", plain), ("hydra", ours)) for i, rate in enumerate(rates)]
    return [made[i] for i in np.random.default_rng(3).permutation(len(made))]


@pytest.mark.parametrize(("questions", "seed"), [(12, 0), (40, 1), (80, 2)])
def test_the_interval_is_the_percentile_bootstrap_of_a_ratio_of_means(questions: int, seed: int) -> None:
    """Questions are drawn as pairs: what is hard for one contender is hard for the other."""
    dice = np.random.default_rng(seed)
    plain = dice.uniform(20, 60, questions)
    ours = plain * dice.uniform(1.2, 2.8, questions)
    hydra = summarise(rows_of(plain, ours), [])["hydra"]
    wanted = stats.bootstrap((ours, plain), lambda one, other, axis=-1: one.mean(axis) / other.mean(axis), paired=True,
                             vectorized=True,
                             n_resamples=20_000, confidence_level=0.95, method="percentile",
                             random_state=np.random.default_rng(1))
    interval = wanted.confidence_interval
    assert hydra["speed_vs_plain"] == pytest.approx(ours.mean() / plain.mean(), abs=1e-3)
    width = interval.high - interval.low
    assert hydra["spread"] == pytest.approx([interval.low, interval.high], abs=0.06 * width)
    apart = stats.bootstrap((ours, plain), lambda one, other, axis=-1: one.mean(axis) / other.mean(axis), vectorized=True,
                            n_resamples=5000, confidence_level=0.95, method="percentile", random_state=np.random.default_rng(1))
    assert apart.confidence_interval.high - apart.confidence_interval.low > 1.15 * width  # another figure, were they not paired


def test_one_question_has_no_interval() -> None:
    assert summarise(rows_of(np.array([10.0]), np.array([20.0])), [])["hydra"]["spread"] is None
