"""How often drafts of each kind come true, learned while decoding.

A draft head's probability is not the chance that the base will choose the token: greedy decoding takes the likeliest one,
sampling shares its noise with the drafter, and a head is only so good. So every drafted node is filed under a kind, each
kind keeps how often its nodes stood when their parent did, and that is what trees are grown by. Rates steer what is
drafted; no token ever depends on them.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

BIN_EDGES = (0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
BINS = len(BIN_EDGES) + 1
MATCH_EDGES = (2.5, 3.5, 5.5, 8.5, 15.5, 31.5)
"""Tokens before a copied draft that agree: two or fewer, three, up to five, eight, fifteen, thirty-one, more."""
MATCHES = len(MATCH_EDGES) + 1
COPIED_AT_FIRST = (0.35, 0.5, 0.65, 0.8, 0.88, 0.94, 0.97)
"""Chance of a copied token by those, before anything is learned."""
SAMPLED_SHARE = 0.5  # of it where tokens are drawn rather than the likeliest taken
DEEP = 4  # copied tokens from here on share one rate
PRIOR_TRIALS = 12.0
"""Tries that a first guess counts for."""
REQUEST_TRIALS = 6.0
"""The same for a request's own ratio."""


class AcceptanceEstimator:
    """Learned rates of `heads` depths, and a ratio for each of `rows`: how its drafts fare against the common rate.

    Kinds are numbered: drafts of head d by probability, copied tokens by depth and agreement, and copied tokens that a
    head drafts too; each for greedy and for sampled rows.
    """

    def __init__(self, heads: int, rows: int) -> None:
        self.heads = heads
        self.edges = np.array(BIN_EDGES)
        centres = (np.array((0.0, *BIN_EDGES)) + np.array((*BIN_EDGES, 1.0))) / 2
        copied = np.array(COPIED_AT_FIRST)
        both = 1 - (1 - copied[:, None]) * (1 - centres)
        halves = [np.concatenate((np.tile(centres, heads), np.tile(share * copied, DEEP), both.ravel()))
                  for share in (1.0, SAMPLED_SHARE)]
        self.half = len(halves[0])
        prior = np.concatenate(halves)
        self.hits, self.trials = prior * PRIOR_TRIALS, np.full_like(prior, PRIOR_TRIALS)
        self.came, self.expected = (np.full(rows, REQUEST_TRIALS) for _ in range(2))
        self._values = self.hits / self.trials

    def restart(self, row: int) -> None:
        """Another request in `row`: nothing is known of it."""
        self.came[row] = self.expected[row] = REQUEST_TRIALS

    def move(self, source: int, target: int) -> None:
        """Row `source` goes on in place `target`."""
        self.came[target], self.expected[target] = self.came[source], self.expected[source]

    def head_kinds(self, depth: int, probabilities: Floats, sampled: Bools) -> Ints:
        """Kinds [B, ...] of head `depth`'s drafts by probability [B, ...]; `sampled`: [B] bool."""
        offset = (sampled * self.half).reshape(-1, *[1] * (probabilities.ndim - 1))
        return np.searchsorted(self.edges, probabilities) + (depth * BINS + offset)

    def copied_kinds(self, length: int, matches: Ints, sampled: Bools) -> Ints:
        """Kinds [B, length] of copied tokens after matches of class [B]."""
        depths = np.arange(length).clip(max=DEEP - 1) * MATCHES
        return (sampled * self.half + self.heads * BINS + matches)[:, None] + depths

    def agreed_kinds(self, head_kinds: Ints, matches: Ints, sampled: Bools) -> Ints:
        """Kinds of copied tokens that a head drafts too, under `head_kinds`; all of one shape or broadcast to it."""
        own_bin = (head_kinds - sampled * self.half) % BINS
        return sampled * self.half + self.heads * BINS + DEEP * MATCHES + matches * BINS + own_bin

    def chances(self, kinds: Ints) -> Floats:
        """Chance [B, ...] that a node of `kinds` [B, ...] stands if its parent does, in rows 0 .. B - 1."""
        batch = len(kinds)
        ratio = (self.came[:batch] / self.expected[:batch]).reshape(-1, *[1] * (kinds.ndim - 1))
        return np.minimum(self._values[kinds] * ratio, 0.995)

    def learn(self, kinds: Ints, tried: Bools, stood: Bools) -> None:
        """Nodes [B, N]: their kinds, which had a parent that stood, and which of those stood themselves (both bool)."""
        batch = len(kinds)
        expected = self._values[kinds.clip(0)]
        self.came[:batch] += stood.sum(-1)
        self.expected[:batch] += (expected * tried).sum(-1)
        self.trials += np.bincount(kinds[tried], minlength=len(self.trials))
        self.hits += np.bincount(kinds[stood], minlength=len(self.hits))
        self._values = self.hits / self.trials


def match_class(matched: int) -> int:
    """The class of a match of so many agreeing tokens."""
    return sum(matched > edge for edge in MATCH_EDGES)
