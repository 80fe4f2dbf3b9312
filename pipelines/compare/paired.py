"""Two benches on the same questions: what differs by more than chance.

Each question is its own control, so what makes one question easy and another hard cancels out. The interval is a bootstrap over
questions (Efron and Tibshirani, An Introduction to the Bootstrap, 1993), the test Wilcoxon's signed-rank test (Biometrics
Bulletin 1, 1945), its p-values adjusted for the number of tests by Holm's method (Scandinavian Journal of Statistics 6, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipelines.bench.plan import PLAIN, Row, is_foreign
from pipelines.compare.records import PairedResult

RESAMPLES = 10000
FEWEST = 6
"""Questions below which Wilcoxon's test cannot reach 5 %, whatever they show."""
LEVEL = 0.05
SPEED, STEPS = "speed against plain", "tokens per step"


def paired_results(first: str, second: str, rows: tuple[Sequence[Row], Sequence[Row]],
                   fastest: tuple[str | None, str | None] = (None, None)) -> list[PairedResult]:
    """The second bench against the first, for every contender that both have and, where they differ, the fastest of each.

    `first`, `second`: labels; `rows`: of each bench. The p-values are not adjusted yet, see `adjusted`.
    """
    names = [dict.fromkeys(row.method for row in own if row.method != PLAIN and not is_foreign(row.method)) for own in rows]
    pairs = [(name, name) for name in names[0] if name in names[1]]
    one, other = fastest
    if one is not None and other is not None and one != other and one in names[0] and other in names[1]:
        pairs.insert(0, (one, other))
    found = []
    for mine, theirs in pairs:
        label = paired_name(mine, theirs)
        for quantity, measure in ((SPEED, speeds), (STEPS, steps)):
            figures = [measure(own, name) for own, name in zip(rows, (mine, theirs), strict=True)]
            shared = sorted(figures[0].keys() & figures[1].keys())
            if len(shared) > 1:
                found.append(_paired(label, quantity, (first, second), *(np.array([values[question] for question in shared])
                                                                        for values in figures)))
    return found


def paired_name(first: str, second: str) -> str:
    """What a pair of contenders is called."""
    return first if first == second else f"{first} → {second}"


def speeds(rows: Sequence[Row], method: str) -> dict[str, tuple[float, float]]:
    """Question -> tokens per second of `method` and of plain decoding, turns and rounds pooled, prefill included."""
    own, plain = (_pooled(rows, name) for name in (method, PLAIN))
    return {question: (own[question][0] / own[question][1], plain[question][0] / plain[question][1])
            for question in own.keys() & plain.keys() if all(min(values[question][:2]) > 0 for values in (own, plain))}


def steps(rows: Sequence[Row], method: str) -> dict[str, tuple[float, float]]:
    """Question -> tokens after the first of each answer, and the base's forwards that made them."""
    return {question: (tokens, forwards) for question, (_, _, tokens, forwards) in _pooled(rows, method).items()
            if tokens and forwards}


def _pooled(rows: Sequence[Row], method: str) -> dict[str, tuple[float, float, float, float]]:
    """Question -> tokens, seconds, tokens after the first, steps."""
    found: dict[str, tuple[float, float, float, float]] = {}
    for row in rows:
        if row.method == method:
            before = found.get(row.question, (0.0, 0.0, 0.0, 0.0))
            more = (len(row.token_ids), row.prefill_seconds + row.decode_seconds, max(0, len(row.token_ids) - 1), row.steps)
            found[row.question] = (before[0] + more[0], before[1] + more[1], before[2] + more[2], before[3] + more[3])
    return found


def _paired(method: str, quantity: str, labels: tuple[str, str], first: np.ndarray, second: np.ndarray) -> PairedResult:
    """`first`, `second`: [questions, 2], numerators and denominators. The ratio is that of the pooled figures, as a bench reports
    them."""
    draws = np.random.default_rng(0).integers(0, len(first), (RESAMPLES, len(first)))
    ratios = _ratio(second[draws].sum(axis=1)) / _ratio(first[draws].sum(axis=1))
    low, high = np.percentile(ratios, [2.5, 97.5])
    ratio = float(_ratio(second.sum(axis=0)) / _ratio(first.sum(axis=0)))
    p = signed_rank(np.log(_ratio(second)) - np.log(_ratio(first)))
    return PairedResult(method, quantity, *labels, len(first), round(ratio, 4), (round(float(low), 4), round(float(high), 4)), p,
                        "")


def _ratio(pairs: np.ndarray) -> np.ndarray:
    return np.asarray(pairs[..., 0] / pairs[..., 1])


def signed_rank(differences: np.ndarray) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test that `differences` [N] lie around 0; None for too few that are not 0,
    1 where all are 0."""
    from scipy.stats import wilcoxon  # not needed by a comparison without a bench

    left = differences[np.abs(differences) > 1e-12]
    if not len(left):
        return 1.0 if len(differences) >= FEWEST else None
    return float(wilcoxon(left).pvalue) if len(left) >= FEWEST else None


def adjusted(results: Sequence[PairedResult]) -> tuple[PairedResult, ...]:
    """The same with p-values by Holm's method over all of them, and with verdicts."""
    order = sorted((place for place, one in enumerate(results) if one.p is not None), key=lambda place: _p(results[place]))
    ps: dict[int, float] = {}
    highest = 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * _p(results[place])))
        ps[place] = highest
    known = [replace(one, p=ps.get(place)) for place, one in enumerate(results)]
    return tuple(replace(one, verdict=_verdict(one)) for one in known)


def _p(result: PairedResult) -> float:
    assert result.p is not None
    return result.p


def _verdict(one: PairedResult) -> str:
    """What both the interval and the test allow to say."""
    if one.p is None:
        return f"too few questions that differ (fewer than {FEWEST})"
    if one.p < LEVEL and (one.interval[0] > 1 or one.interval[1] < 1):
        words = ("faster", "slower") if one.quantity == SPEED else ("more", "fewer")
        return words[0] if one.interval[0] > 1 else words[1]
    return "no difference shown"
