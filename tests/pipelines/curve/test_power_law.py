"""The fit of a curve: against known curves and scipy, its interval by simulation, and data that has no curve."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import curve_fit

from pipelines.curve.power_law import CannotFit, PowerLaw, fit_power_law, foretell

ROWS = [100.0, 200.0, 400.0, 800.0, 1600.0]


def values(a: float, b: float, c: float, rows: list[float] = ROWS) -> list[float]:
    return [a - b * row ** -c for row in rows]


def fitted(rows: list[float], found: list[float], limit: float = 5.0) -> PowerLaw:
    law = fit_power_law(rows, found, limit)
    assert isinstance(law, PowerLaw)
    return law


@pytest.mark.parametrize(("a", "b", "c"), [(2.6, 3.0, 0.3), (3.0, 8.0, 0.6), (1.9, 2.0, 0.15)])
def test_a_known_curve_is_found(a: float, b: float, c: float) -> None:
    law = fitted(ROWS, values(a, b, c))
    assert law.ceiling == pytest.approx(a, abs=0.03) and law.exponent == pytest.approx(c, rel=0.05)
    assert law.scale * law.unit ** law.exponent == pytest.approx(b, rel=0.15)  # b of rows that are not divided by the unit
    assert law.noise < 1e-3 and law.rises
    assert law.at(6400) == pytest.approx(a - b * 6400 ** -c, abs=2e-3)
    assert law.rise == pytest.approx(law.at(1600) - law.at(100))


def test_it_is_the_least_squares_fit() -> None:
    """As scipy's own search finds it from a good start."""
    random = np.random.default_rng(0)
    noisy = [value + random.normal(0, 0.02) for value in values(2.6, 3.0, 0.4)]
    law = fitted(ROWS, noisy)
    (a, b, c), _ = curve_fit(lambda rows, a, b, c: a - b * (rows / 1600) ** -c, np.array(ROWS), noisy, p0=(2.6, 0.15, 0.4))
    ours = sum((law.at(row) - value) ** 2 for row, value in zip(ROWS, noisy, strict=True))
    theirs = sum((a - b * (row / 1600) ** -c - value) ** 2 for row, value in zip(ROWS, noisy, strict=True))
    assert ours <= theirs * 1.001
    assert law.at(3200) == pytest.approx(a - b * 2 ** -c, abs=2e-3)
    assert law.noise == pytest.approx((theirs / 2) ** 0.5, rel=1e-3)  # five values less three parameters


def test_no_more_tokens_than_heads_accept() -> None:
    """A straight line over the logarithm of rows has no ceiling: what K heads and the base can give is one."""
    law = fitted(ROWS, [1.0 + 0.5 * number for number in range(5)], limit=3.2)
    assert law.ceiling == 3.2 and law.at(1e9) <= 3.2
    assert all(one.high <= 3.2 for one in foretell(law, ROWS, [6400, 64000], 3.2))


@pytest.mark.parametrize("found", [[2.0] * 5, [2.4, 2.3, 2.2, 2.1, 2.0]], ids=["equal", "falling"])
def test_rows_that_do_not_help(found: list[float]) -> None:
    law = fitted(ROWS, found)
    assert law.scale == 0 and not law.rises and law.at(6400) == pytest.approx(np.mean(found))
    (told,) = foretell(law, ROWS, [6400], 5.0)
    assert told.low <= told.tokens_per_step <= told.high


def test_a_rise_within_the_noise_is_none() -> None:
    assert not fitted(ROWS, [2.00, 2.02, 1.99, 2.02, 2.01]).rises


@pytest.mark.parametrize(("rows", "why"), [
    ([100.0, 200.0], "4 or more different numbers of rows, and there are 2"),
    ([100.0, 100.0, 100.0, 200.0, 400.0], "and there are 3"), ([], "and there are 0"),
    ([0.0, 100.0, 200.0, 400.0], "no positive number")])
def test_what_has_no_curve(rows: list[float], why: str) -> None:
    law = fit_power_law(rows, [2.0] * len(rows), 5.0)
    assert isinstance(law, CannotFit) and why in law.why
    assert isinstance(fit_power_law([100.0, 200.0, 400.0, 800.0], [1.0, 2.0, float("nan"), 2.0], 5.0), CannotFit)
    with pytest.raises(ValueError, match="do not fit"):
        fit_power_law([1.0], [], 5.0)


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_interval_holds_what_it_promises(seeds: int) -> None:
    """Of 60 curves with noise about 95 % foretell a new mean inside their interval. Fewer than 80 % has a chance of 1 in
    10,000."""
    random, held = np.random.default_rng(seeds), 0
    rows, truth = ROWS[:4] * seeds, values(2.6, 3.0, 0.3, [1600.0])[0]
    for _ in range(60):
        law = fitted(rows, [value + random.normal(0, 0.01) for value in values(2.6, 3.0, 0.3, rows)])
        (told,) = foretell(law, rows, [1600.0], 5.0, seeds)
        held += told.low <= truth + random.normal(0, 0.01) / seeds ** 0.5 <= told.high
    assert held >= 48
    if seeds == 2:
        assert told.high - told.low < 0.5  # and it says something


def test_more_noise_and_more_distance_make_it_wider() -> None:
    random = np.random.default_rng(3)
    noise = random.normal(0, 0.01, 10)
    rows, clean = ROWS * 2, values(2.6, 3.0, 0.3, ROWS * 2)
    quiet, loud = (fitted(rows, [value + size * one for value, one in zip(clean, noise, strict=True)]) for size in (1, 3))
    near, far = foretell(quiet, rows, [3200, 25600], 5.0, 2)
    (wide,) = foretell(loud, rows, [3200], 5.0, 2)
    assert near.high - near.low < far.high - far.low and near.high - near.low < wide.high - wide.low
    assert foretell(quiet, rows, [3200, 25600], 5.0, 2) == [near, far]  # the same draws
