"""The paired test: against scipy and by hand, on differences that are there, that are none, and that are too few."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import wilcoxon

from pipelines.bench.plan import Row
from pipelines.bench.report import summarise
from pipelines.compare.paired import SPEED, STEPS, adjusted, paired_results, signed_rank, speeds
from pipelines.compare.records import PairedResult


def rows(gains: dict[str, float], questions: int = 20, pace: float = 0.01, seed: int = 0) -> list[Row]:
    """`gains`: contender -> speed against plain; each question has an ease that is the same in every bench."""
    ease, noise = random.Random(3), random.Random(seed)
    found = []
    for number in range(questions):
        factor = ease.uniform(0.6, 1.4)
        for method, gain in {"plain": 1.0, **gains}.items():
            steps = 40 if method == "plain" else round(40 / (1 + (gain - 1) * factor))
            found.append(Row(round=0, question=f"q{number}", category="all", method=method, token_ids=tuple(range(41)),
                             steps=steps, prefill_seconds=pace, decode_seconds=steps * pace * noise.uniform(0.97, 1.03)))
    return found


def test_a_difference_that_is_there_whatever_the_pace_of_the_machine() -> None:
    first, second = rows({"hydra": 1.5}), rows({"hydra": 1.8}, pace=0.03, seed=1)
    speed, steps = adjusted(paired_results("a", "b", (first, second)))
    assert (speed.quantity, speed.method, speed.questions, speed.verdict) == (SPEED, "hydra", 20, "faster")
    assert speed.p is not None and speed.p < 1e-4 and 1.1 < speed.interval[0] < speed.ratio < speed.interval[1] < 1.3
    assert (steps.quantity, steps.verdict) == (STEPS, "more")
    (back, _) = adjusted(paired_results("b", "a", (second, first)))
    assert back.verdict == "slower" and back.ratio == pytest.approx(1 / speed.ratio, rel=1e-3)


def test_the_ratio_is_that_of_the_benches_own_figures() -> None:
    first, second = rows({"hydra": 1.5}), rows({"hydra": 1.8}, seed=1)
    figures = [summarise(own, [])["hydra"] for own in (first, second)]
    speed, steps = paired_results("a", "b", (first, second))
    assert speed.ratio == pytest.approx(figures[1]["speed_vs_plain"] / figures[0]["speed_vs_plain"], rel=2e-3)
    assert steps.ratio == pytest.approx(figures[1]["tokens_per_step"] / figures[0]["tokens_per_step"], rel=2e-3)


def test_no_difference() -> None:
    """The same heads benched twice: the times differ by noise, the steps not at all."""
    speed, steps = adjusted(paired_results("a", "b", (rows({"hydra": 1.5}), rows({"hydra": 1.5}, seed=1))))
    assert speed.verdict == steps.verdict == "no difference shown" and steps.ratio == 1.0 and steps.p == 1.0


def test_few_questions_decide_nothing() -> None:
    speed, _ = adjusted(paired_results("a", "b", (rows({"hydra": 1.2}, 5), rows({"hydra": 1.9}, 5))))
    assert speed.p is None and speed.verdict.startswith("too few questions") and speed.ratio > 1.2
    assert paired_results("a", "b", (rows({"hydra": 1.2}, 1), rows({"hydra": 1.9}, 1))) == []


def test_only_questions_and_contenders_of_both() -> None:
    first, second = rows({"hydra": 1.5, "ngram": 1.1, "transformers": 0.5}, 12), rows({"medusa": 1.3, "ngram": 1.1}, 9)
    found = paired_results("a", "b", (first, second), ("hydra", "medusa"))
    assert [(one.method, one.questions) for one in found] == [("hydra → medusa", 9)] * 2 + [("ngram", 9)] * 2
    assert not speeds([row for row in first if row.method != "plain"], "hydra")


def test_signed_rank() -> None:
    differences = np.random.default_rng(0).normal(0.3, 1.0, 15)
    assert signed_rank(differences) == pytest.approx(wilcoxon(differences).pvalue)
    assert signed_rank(np.full(6, 0.5)) == pytest.approx(2 / 2**6)  # all 2^6 signs are equally likely where nothing differs
    assert signed_rank(np.full(5, 0.5)) is None and signed_rank(np.zeros(5)) is None and signed_rank(np.zeros(8)) == 1.0


def test_p_values_are_adjusted_by_holm() -> None:
    def result(p: float | None, interval: tuple[float, float] = (1.1, 1.3)) -> PairedResult:
        return PairedResult("m", SPEED, "a", "b", 20, 1.2, interval, p, "")

    found = adjusted([result(0.04), result(0.01), result(None), result(0.03), result(0.9)])
    assert [one.p for one in found] == [pytest.approx(0.09), pytest.approx(0.04), None, pytest.approx(0.09), pytest.approx(0.9)]
    assert [one.verdict.split()[0] for one in found] == ["no", "faster", "too", "no", "no"]
    assert adjusted([result(0.01, (0.98, 1.3))])[0].verdict == "no difference shown"  # the interval says otherwise
