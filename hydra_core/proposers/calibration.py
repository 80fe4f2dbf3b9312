"""How long steps take here and now, relative to what the cost table predicts.

A table is measured once, on a machine that may have been slower or faster then, and in other proportions: other work on the
same processors slows matrix products down but not reads of memory, or the other way round. So the time of a plain step and
the time that nodes add to it are each corrected by a factor of its own, learned from the steps that are taken. The factors
move together until steps of different sizes tell them apart. They steer what is drafted; no token ever depends on them.

A Kalman filter (1960) of two values for each power of two of the batch size; all deviations are relative to the value.
"""

from __future__ import annotations

from dataclasses import dataclass

CORRELATION = 0.6
"""Correlation of the two factors' changes."""
INITIAL_DEVIATION, DRIFT, NOISE = 0.5, 0.02, 0.1
"""Deviations: of a factor before any step, of its change from one step to the next, and of a step's time."""
LARGEST_SURPRISE = 0.5
"""A step whose time differs from the prediction by more than this share counts as one that differs by this share."""
APART = 4.0
"""Largest ratio between the two factors."""
RETURN = 0.01
"""Share of the difference between the factors that each step forgets, so that nodes that were expensive and are no longer
verified are tried again."""


@dataclass
class Factors:
    """Measured over predicted time of a plain step, `plain`, and of what nodes add, `nodes`; `variances`: of both, then the
    covariance."""

    plain: float
    nodes: float
    variances: tuple[float, float, float]

    @classmethod
    def uncertain(cls, factor: float) -> Factors:
        """Before any step: both about `factor`."""
        return cls(factor, factor, _variances(INITIAL_DEVIATION * factor))


class CostCalibrator:
    """Factors for each power of two of the batch size, and one for drafting with heads."""

    def __init__(self) -> None:
        self._factors: dict[int, Factors] = {}
        self._drafting: float | None = None
        self._drafting_variance = INITIAL_DEVIATION ** 2
        self._latest = 1.0

    def factors(self, batch: int) -> tuple[float, float]:
        """Factors on the seconds of a plain step of `batch` sequences, and on the seconds that nodes add to it."""
        found = self._factors.get(batch.bit_length())
        return (found.plain, found.nodes) if found else (self._latest, self._latest)

    @property
    def drafting(self) -> float:
        """Factor on the seconds of drafting."""
        return self._latest if self._drafting is None else self._drafting

    def update(self, batch: int, plain: float, nodes: float, measured: float) -> None:
        """A step predicted to take `plain` seconds and `nodes` more took `measured` seconds.

        The first step of a batch size counts like any other: what it sets up is not what later ones take.
        """
        found = self._factors.setdefault(batch.bit_length(), Factors.uncertain(self._latest))
        _correct(found, nodes / plain, measured / plain)
        self._latest = found.plain

    def update_drafting(self, predicted: float, measured: float) -> None:
        """Drafting with heads, predicted to take `predicted` seconds, took `measured` seconds.

        The first drafts often take many times as long as later ones (libraries and memory are set up then), so that no one
        sample counts whole: a factor that is far too high would switch heads off, and nothing would correct it.
        """
        before, variance = self.drafting, self._drafting_variance + DRIFT ** 2
        surprise = min(max(measured / predicted / before - 1, -LARGEST_SURPRISE), LARGEST_SURPRISE)
        gain = variance / (variance + NOISE ** 2)
        self._drafting, self._drafting_variance = before * (1 + gain * surprise), (1 - gain) * variance


def _variances(deviation: float) -> tuple[float, float, float]:
    own = deviation * deviation
    return own, own, CORRELATION * own


def _correct(factors: Factors, share: float, measured: float) -> None:
    """One step in units of the predicted plain step: nodes were predicted to add `share`, and it took `measured`."""
    drift = _variances(DRIFT * factors.plain)
    first, second, both = (value + more for value, more in zip(factors.variances, drift, strict=True))
    factors.nodes += RETURN * (factors.plain - factors.nodes)
    expected = factors.plain + factors.nodes * share
    surprise = min(max(measured - expected, -LARGEST_SURPRISE * expected), LARGEST_SURPRISE * expected)
    usual = surprise == measured - expected
    plain_gain, nodes_gain = first + both * share, both + second * share
    spread = plain_gain + nodes_gain * share + (NOISE * expected) ** 2
    factors.plain = max(factors.plain + plain_gain / spread * surprise, 0.1 * factors.plain)
    factors.nodes = min(max(factors.nodes + nodes_gain / spread * surprise, factors.plain / APART), factors.plain * APART)
    seen = 1 / spread if usual else 0.0  # what is cut short makes nothing more certain
    factors.variances = (first - plain_gain * plain_gain * seen, second - nodes_gain * nodes_gain * seen,
                         both - plain_gain * nodes_gain * seen)
