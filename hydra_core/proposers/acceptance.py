"""How often drafts of each kind are accepted, learned while decoding.

A draft head's probability is not the probability that the base chooses the token: greedy decoding takes the argmax, sampling
shares its noise with the drafter, and a head is only so good. So every drafted node has a kind (its source, and its
probability or the length of its match), each kind keeps how often its nodes were accepted when their parent was, and dynamic
trees are built from that. The estimates steer what is drafted; no token ever depends on them.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

BIN_EDGES = (0.005, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
"""Edges of the bins of a head's probability."""
BINS = len(BIN_EDGES) + 1
MATCH_EDGES = (2.5, 3.5, 5.5, 8.5, 15.5, 31.5)
"""Classes of a match by the number of tokens before the copied draft that agree: up to two, three, five, eight, fifteen,
thirty-one, more."""
MATCHES = len(MATCH_EDGES) + 1
COPIED_PRIOR = (0.35, 0.5, 0.65, 0.8, 0.88, 0.94, 0.97)
"""Acceptance of a copied token by class of the match, before anything is learned."""
SAMPLED_SHARE = 0.5
"""Factor on `COPIED_PRIOR` for sequences that draw their tokens."""
DEEP = 4
"""Copied tokens from this depth on share one estimate."""
SINGLE_SHARE = 2 / 3
"""Share of a continuation that followed the only earlier occurrence: `COPIED_PRIOR` is for such ones."""
STRENGTH_EDGES = (0.3, 0.6, 0.85)
"""Classes of a share, where a head drafts the same token."""
STRENGTHS = len(STRENGTH_EDGES) + 1
PRIOR_TRIALS = 12.0
"""Number of trials that the prior of a kind counts for."""
REQUEST_TRIALS = 6.0
"""Number of trials that the prior of a sequence's own ratio counts for."""
MOST_TRIALS, MOST_REQUEST_TRIALS = 2000.0, 300.0
"""Trials that an estimate, and a sequence's own ratio, remember: the weight of earlier ones fades, so that what drafts are worth
is learned again when texts or heads change."""


class AcceptanceEstimator:
    """Learned acceptance by kind for `heads` depths, and a ratio for each of `rows`: how often the drafts of its sequence are
    accepted, relative to the estimates.

    Kinds are numbered: drafts of head d by probability, copied tokens by depth and class of match, copied tokens that a head
    drafts too, continuations of earlier answers by class of match and share, and those that a head drafts too; each separately
    for greedy and for sampled sequences.
    """

    def __init__(self, heads: int, rows: int) -> None:
        self.heads = heads
        self.edges, self.strengths = np.array(BIN_EDGES), np.array(STRENGTH_EDGES)
        centres = (np.array((0.0, *BIN_EDGES)) + np.array((*BIN_EDGES, 1.0))) / 2
        copied, strengths = np.array(COPIED_PRIOR), (np.array((0.0, *STRENGTH_EDGES)) + np.array((*STRENGTH_EDGES, 1.0))) / 2
        both = 1 - (1 - copied[:, None]) * (1 - centres)
        frequent = copied[:, None] * np.minimum(centres / SINGLE_SHARE, 1)
        agreed = 1 - (1 - strengths[:, None]) * (1 - centres)
        halves = [np.concatenate((np.tile(centres, heads), np.tile(share * copied, DEEP), both.ravel(),
                                  share * frequent.ravel(), agreed.ravel()))
                  for share in (1.0, SAMPLED_SHARE)]
        self.half = len(halves[0])
        prior = np.concatenate(halves)
        self.hits, self.trials = prior * PRIOR_TRIALS, np.full_like(prior, PRIOR_TRIALS)
        self.accepted, self.expected = (np.full(rows, REQUEST_TRIALS) for _ in range(2))
        self._values = self.hits / self.trials

    def reset(self, row: int) -> None:
        """A new sequence takes `row`: nothing is known of it."""
        self.accepted[row] = self.expected[row] = REQUEST_TRIALS

    def move(self, source: int, target: int) -> None:
        """The sequence of row `source` continues in row `target`."""
        self.accepted[target], self.expected[target] = self.accepted[source], self.expected[source]

    def head_kinds(self, depth: int, probabilities: Floats, sampled: Bools) -> Ints:
        """Kinds [B, ...] int64 of head `depth`'s drafts by probability [B, ...]; `sampled`: [B], sequences that draw."""
        offset = (sampled * self.half).reshape(-1, *[1] * (probabilities.ndim - 1))
        kinds: Ints = np.searchsorted(self.edges, probabilities) + (depth * BINS + offset)
        return kinds

    def copied_kinds(self, length: int, matches: Ints, sampled: Bools) -> Ints:
        """Kinds [B, length] int64 of copied tokens after matches of class [B]."""
        depths = np.arange(length).clip(max=DEEP - 1) * MATCHES
        kinds: Ints = (sampled * self.half + self.heads * BINS + matches)[:, None] + depths
        return kinds

    def agreed_kinds(self, head_kinds: Ints, matches: Ints, sampled: Bools) -> Ints:
        """Kinds of copied tokens that a head drafts too, under `head_kinds`; all of one shape or broadcast to it."""
        own_bin = (head_kinds - sampled * self.half) % BINS
        kinds: Ints = sampled * self.half + self.heads * BINS + DEEP * MATCHES + matches * BINS + own_bin
        return kinds

    def suffix_kinds(self, matches: Ints, shares: Floats, sampled: Bools) -> Ints:
        """Kinds [B, M] int64 of continuations of earlier answers, by class of match and by share, both [B, M]."""
        kinds: Ints = sampled[:, None] * self.half + self._suffix_start + matches * BINS + np.searchsorted(self.edges, shares)
        return kinds

    def suffix_agreed_kinds(self, head_kinds: Ints, shares: Floats, sampled: Bools) -> Ints:
        """Kinds [B, M] int64 of continuations of earlier answers that a head drafts too, under `head_kinds` [B, M]."""
        offset = sampled[:, None] * self.half
        start = self._suffix_start + MATCHES * BINS
        kinds: Ints = offset + start + np.searchsorted(self.strengths, shares) * BINS + (head_kinds - offset) % BINS
        return kinds

    def of_heads(self, kinds: Ints) -> Bools:
        """Which of `kinds` are those of drafts of heads alone."""
        found: Bools = (kinds >= 0) & (kinds % self.half < self.heads * BINS)
        return found

    @property
    def _suffix_start(self) -> int:
        return self.heads * BINS + DEEP * MATCHES + MATCHES * BINS

    def probabilities(self, kinds: Ints) -> Floats:
        """Probability [B, ...] that a node of `kinds` [B, ...] is accepted if its parent is, in rows 0 .. B - 1."""
        batch = len(kinds)
        ratio = (self.accepted[:batch] / self.expected[:batch]).reshape(-1, *[1] * (kinds.ndim - 1))
        values: Floats = np.minimum(self._values[kinds] * ratio, 0.995)
        return values

    def update(self, kinds: Ints, tried: Bools, accepted: Bools) -> None:
        """Learn from nodes [B, N]: their kinds, which of them had an accepted parent, and which were accepted themselves."""
        batch = len(kinds)
        expected = self._values[kinds.clip(0)]
        self.accepted[:batch] += accepted.sum(-1)
        self.expected[:batch] += (expected * tried).sum(-1)
        self.trials += np.bincount(kinds[tried], minlength=len(self.trials))
        self.hits += np.bincount(kinds[accepted], minlength=len(self.hits))
        _forget(self.hits, self.trials, MOST_TRIALS)
        _forget(self.accepted, self.expected, MOST_REQUEST_TRIALS)
        self._values = self.hits / self.trials


def _forget(hits: Floats, trials: Floats, most: float) -> None:
    """Let estimates of more than `most` trials stand for so many, with the same ratio."""
    share = np.minimum(most / trials, 1.0)
    hits *= share
    trials *= share


def match_class(matched: int) -> int:
    """The class of a match in which `matched` tokens agree."""
    return sum(matched > edge for edge in MATCH_EDGES)
