"""How long steps take here and now, against what a cost table foretells of them.

A table is measured once, on a machine that may have been slower or faster then, and in other proportions: other work on the
same processors takes matrix products more time and reads of memory none, or the other way round. So what a plain step takes
and what nodes add to it are each corrected by a factor of its own, learned from the steps that are taken. The factors move
together until steps of different sizes tell them apart. They steer what is drafted; no token ever depends on them.

A Kalman filter (1960) of two values for each rough batch size; all deviations are shares of the value itself.
"""

from __future__ import annotations

from dataclasses import dataclass

ALIKE = 0.6
"""How far the two factors are expected to move together, 1 being always."""
AT_FIRST, DRIFT, NOISE = 0.5, 0.02, 0.1
"""Deviations of a factor when nothing is known but one step, of its change from a step to the next, and of a step's time."""
LARGEST_SURPRISE = 0.5
"""A step that took longer or shorter than foretold by more than this share counts as one that did so by as much."""
APART = 4.0
"""The two factors are never told further apart."""
RETURN = 0.01
"""Share of what tells them apart that a step forgets: nodes that were dear and are no longer verified are tried again."""


@dataclass
class Factors:
    """What a plain step takes, `plain`, and what nodes add, `nodes`, over what was foretold; the variances of both, and the
    covariance."""

    plain: float
    nodes: float
    variances: tuple[float, float, float]

    @classmethod
    def known_from(cls, ratio: float) -> Factors:
        """After one step that took `ratio` times as long as foretold."""
        return cls(ratio, ratio, _variances(AT_FIRST * ratio))


class CostCalibrator:
    """Factors for each rough batch size, and one for drafting with heads."""

    def __init__(self) -> None:
        self._factors: dict[int, Factors] = {}
        self._drafting: float | None = None
        self._latest = 1.0

    def factors(self, batch: int) -> tuple[float, float]:
        """By which the seconds of a plain step of `batch` rows are to be multiplied, and those that nodes add to it."""
        known = self._factors.get(batch.bit_length())
        return (known.plain, known.nodes) if known else (self._latest, self._latest)

    @property
    def drafting(self) -> float:
        """By which the seconds of drafting are to be multiplied."""
        return self._latest if self._drafting is None else self._drafting

    def learn(self, batch: int, plain: float, nodes: float, took: float) -> None:
        """A step was foretold to take `plain` seconds and `nodes` more, and took so many."""
        key = batch.bit_length()
        known = self._factors.get(key)
        if known is None:
            self._factors[key] = Factors.known_from(took / (plain + nodes))
        else:
            _correct(known, nodes / plain, took / plain)
        self._latest = self._factors[key].plain

    def learn_drafting(self, foretold: float, took: float) -> None:
        """Drafting with heads was foretold to take so many seconds, and took so many."""
        ratio = took / foretold
        known = ratio if self._drafting is None else self._drafting
        surprise = min(max(ratio / known - 1, -LARGEST_SURPRISE), LARGEST_SURPRISE)
        self._drafting = known * (1 + surprise * DRIFT / NOISE)


def _variances(deviation: float) -> tuple[float, float, float]:
    own = deviation * deviation
    return own, own, ALIKE * own


def _correct(known: Factors, share: float, took: float) -> None:
    """One step in units of a plain one as foretold: nodes were to add `share` to it, and it took `took`."""
    first, second, both = (value + more for value, more in zip(known.variances, _variances(DRIFT * known.plain), strict=True))
    known.nodes += RETURN * (known.plain - known.nodes)
    expected = known.plain + known.nodes * share
    surprise = min(max(took - expected, -LARGEST_SURPRISE * expected), LARGEST_SURPRISE * expected)
    plain_gain, nodes_gain = first + both * share, both + second * share
    spread = plain_gain + nodes_gain * share + (NOISE * expected) ** 2
    known.plain = max(known.plain + plain_gain / spread * surprise, 0.1 * known.plain)
    known.nodes = min(max(known.nodes + nodes_gain / spread * surprise, known.plain / APART), known.plain * APART)
    known.variances = (first - plain_gain * plain_gain / spread, second - nodes_gain * nodes_gain / spread,
                       both - plain_gain * nodes_gain / spread)
