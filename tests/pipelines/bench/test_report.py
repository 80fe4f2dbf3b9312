"""Figures of a bench against an independent library, on made-up rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from pipelines.bench.plan import Row
from pipelines.bench.report import summarise

QUESTIONS = 40


def rows() -> list[Row]:
    """Two rounds of two contenders on questions of different lengths; the second is about 1.5 times as fast."""
    generator = np.random.default_rng(7)
    made = []
    for question in range(QUESTIONS):
        tokens = int(generator.integers(5, 60))
        for turn in range(2):
            for number in range(2):
                for method, speed in (("plain", 1.0), ("hydra", 1.5)):
                    seconds = tokens * float(generator.uniform(0.5, 1.5)) / speed / 100
                    made.append(Row(round=number, question=str(question), category=str(question % 2), method=method, turn=turn,
                                    token_ids=tuple(range(tokens)), steps=tokens - 1, prefill_seconds=seconds / 4,
                                    decode_seconds=seconds))
    return made


def rates(of: list[Row], method: str, prefill: bool) -> np.ndarray:
    """Tokens per second of each question."""
    found = []
    for question in range(QUESTIONS):
        own = [row for row in of if row.method == method and row.question == str(question)]
        if own:
            tokens = sum(len(row.token_ids) - (not prefill) for row in own)
            found.append(tokens / sum(row.decode_seconds + prefill * row.prefill_seconds for row in own))
    return np.array(found)


def test_the_interval_is_that_of_a_bootstrap_over_questions() -> None:
    """scipy's own, with more resamples: the ends agree up to the chance of 2,000 of them."""
    made = rows()
    found = summarise(made, [])["hydra"]
    for prefill, name in ((True, "speed_vs_plain"), (False, "decode_speed_vs_plain")):
        assert found[name] == pytest.approx(rates(made, "hydra", prefill).mean() / rates(made, "plain", prefill).mean(), abs=1e-3)
    by_category = [([row for row in made if row.category == name], found["categories"][name]) for name in ("0", "1")]
    for own, figures in [(made, found), *by_category]:
        wanted = bootstrap((rates(own, "hydra", True), rates(own, "plain", True)),
                           lambda ours, theirs, axis: ours.sum(axis=axis) / theirs.sum(axis=axis), paired=True, vectorized=True,
                           n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)).confidence_interval
        width = wanted.high - wanted.low
        assert 0.05 < width < 0.6
        assert figures["spread"] == pytest.approx([wanted.low, wanted.high], abs=0.1 * width)
        assert figures["spread"][0] < figures["speed_vs_plain"] < figures["spread"][1]


def test_tokens_per_step_are_pooled() -> None:
    """Of all tokens after the first ones and all steps, not a mean of ratios."""
    made = [Row(round=0, question=str(number), category="all", method="hydra", token_ids=(1,) * tokens, steps=steps,
                prefill_seconds=0.1, decode_seconds=1.0) for number, (tokens, steps) in enumerate([(11, 5), (2, 1), (41, 10)])]
    assert summarise(made, [])["hydra"]["tokens_per_step"] == pytest.approx((10 + 1 + 40) / 16, abs=1e-3)
