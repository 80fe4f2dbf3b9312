"""A saturating power law fitted to tokens per step over training rows, and what it foretells.

    tokens per step = a - b * rows**-c        a: ceiling, b > 0, c > 0

Sources: Hestness et al. 2017 (arXiv 1712.00409), the form with an irreducible part, and each size trained to its best validation;
Kaplan et al. 2020 (arXiv 2001.08361), powers of the data's size. A tree over K heads accepts K tokens and the base adds one, so a
is at most K + 1. For a given c the best a and b have a closed form (variable projection, Golub and Pereyra 1973): the fit cannot
fail to converge, and thousands of fits for an interval take milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SIZES = 4
"""Different numbers of rows that a fit of three parameters needs."""
EXPONENTS = np.geomspace(0.02, 3.0, 150)
DRAWS = 1000
"""Fits of an interval."""
LEVEL = 0.95
PARAMETERS = 3
ROUNDING = 5e-5
"""Tokens per step are recorded with four decimals."""


@dataclass(frozen=True)
class PowerLaw:
    """`ceiling - scale * (rows / unit)**-exponent`. `unit`: the most rows of the fit; `noise`: standard deviation of one
    training's tokens per step around the curve; `rise`: the curve at the most rows less that at the fewest."""

    ceiling: float
    scale: float
    exponent: float
    unit: float
    noise: float
    rise: float

    def at(self, rows: float) -> float:
        """Tokens per step with `rows` training rows."""
        return float(self.ceiling - self.scale * (rows / self.unit) ** -self.exponent)

    @property
    def rises(self) -> bool:
        """Whether the rise is more than the noise: else more rows are not shown to help."""
        return self.rise > max(2 * self.noise, ROUNDING)


@dataclass(frozen=True)
class Foretold:
    """Tokens per step at `rows` rows, with the interval in which 95 of 100 measurements (means over seeds) would be."""

    rows: float
    tokens_per_step: float
    low: float
    high: float


@dataclass(frozen=True)
class CannotFit:
    """Why there is no curve."""

    why: str


def fit_power_law(rows: Sequence[float], values: Sequence[float], limit: float) -> PowerLaw | CannotFit:
    """Least squares over single trainings: `rows` and `values` have one entry for each; `limit`: most tokens per step there can
    be."""
    if why := _why_not(rows, values):
        return CannotFit(why)
    at, y = np.asarray(rows, float), np.asarray(values, float)
    unit = at.max()
    ceilings, scales, exponents = _fit_many(at / unit, y[None], limit)
    fitted = ceilings - scales * (at / unit) ** -exponents
    noise = float(np.sqrt(((y - fitted) ** 2).sum() / max(len(y) - PARAMETERS, 1)))
    return PowerLaw(float(ceilings[0]), float(scales[0]), float(exponents[0]), float(unit), noise,
                    float(fitted.max() - fitted.min()))


def foretell(law: PowerLaw, rows: Sequence[float], ahead: Sequence[float], limit: float, seeds: int = 1,
             random_seed: int = 0) -> list[Foretold]:
    """What the curve says at each of `ahead`, with the interval of a mean over `seeds` trainings.

    A parametric bootstrap (Efron and Tibshirani 1993, chapter 6): the curve is fitted anew to values drawn around it at the
    `rows` of the fit, and the noise of the new measurement is added. The size of the noise is drawn too, from its chi-square
    distribution, as few trainings tell it badly.
    """
    at, random = np.asarray(rows, float) / law.unit, np.random.default_rng(random_seed)
    free = max(len(at) - PARAMETERS, 1)
    noise = max(law.noise, ROUNDING) * np.sqrt(free / random.chisquare(free, (DRAWS, 1)))
    drawn = law.ceiling - law.scale * at ** -law.exponent + noise * random.standard_normal((DRAWS, len(at)))
    ceilings, scales, exponents = (found[:, None] for found in _fit_many(at, np.clip(drawn, 1.0, limit), limit))
    asked = np.asarray(ahead, float) / law.unit
    new = ceilings - scales * asked ** -exponents + noise * random.standard_normal((DRAWS, len(asked))) / np.sqrt(seeds)
    low, high = np.quantile(np.clip(new, 1.0, limit), ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return [Foretold(float(where), law.at(where), min(float(lowest), law.at(where)), max(float(highest), law.at(where)))
            for where, lowest, highest in zip(ahead, low, high, strict=True)]


def _why_not(rows: Sequence[float], values: Sequence[float]) -> str | None:
    if len(rows) != len(values):
        raise ValueError(f"{len(rows)} numbers of rows do not fit {len(values)} values")
    if not (np.all(np.isfinite(values)) and np.all(np.isfinite(rows)) and np.all(np.asarray(rows) > 0)):
        return "a number of rows or a value is no positive number"
    if (sizes := len(set(rows))) < LEAST_SIZES:
        return f"a curve of three parameters needs {LEAST_SIZES} or more different numbers of rows, and there are {sizes}"
    return None


def _fit_many(at: np.ndarray, values: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ceilings, scales and exponents, [B] each, of the best curves through `values` [B, n] at `at` [n], with scale >= 0 and
    ceiling <= limit."""
    best = np.full(len(values), np.inf)
    found = np.zeros((3, len(values)))
    mean = values.mean(1)
    for exponent in EXPONENTS:
        u = at ** -exponent
        spread = u - u.mean()
        scale = np.maximum(-(values @ spread) / (spread @ spread), 0.0)
        ceiling = mean + scale * u.mean()
        over = ceiling > limit  # the best point is then on that border, as the problem is convex
        scale = np.where(over, np.maximum((limit - values) @ u / (u @ u), 0.0), scale)
        ceiling = np.where(over, limit, ceiling)
        error = ((values - ceiling[:, None] + scale[:, None] * u) ** 2).sum(1)
        better = error < best
        best[better] = error[better]
        found[:, better] = np.stack([ceiling, scale, np.full(len(values), exponent)])[:, better]
    return found[0], found[1], found[2]
