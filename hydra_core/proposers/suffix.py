"""Drafts from all that was answered before: what followed the last tokens in this text and in finished answers, and how often.

SuffixDecoding (Oliaro et al., 2024, arXiv 2411.04975): a tree of continuations, grown by their frequencies. Here the
frequencies decide which continuations are candidates; how probable a candidate is, is learned (`AcceptanceEstimator`), and
costs decide how many are verified, as for all candidates of a dynamic tree. A draft that the base would not say is dropped:
whose answers are in memory changes the speed only, never a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from hydra_core.errors import InputError
from hydra_core.proposers.acceptance import Floats, Ints, match_class
from hydra_core.proposers.suffix_index import LONGEST_MATCH, SuffixIndex

CONTEXT = 16
"""Tokens of a prompt's end that are kept before its answer, so that the answer's first tokens are found by them."""
MOST_PLACES = 24
"""Places whose continuations are counted: the best matches, then the latest."""
SHORTER = 0.25
"""A place whose match is one token shorter than the best counts so much less."""
SATURATED = 8
"""Matches of so many tokens count alike."""
ESCAPE = 1.5
"""Count of the continuation that was never seen, as in prediction by partial matching (Cleary and Witten, 1984), divided by one
more than the tokens that agree: after a long match nothing else follows."""
LEAST_SHARE = 0.03
"""Share of a context's occurrences below which a path is no candidate."""


@dataclass(frozen=True)
class SuffixDrafter:
    """Settings of drafts from earlier answers.

    `length`: most tokens of a path; `nodes`: most candidates of a sequence and step; `max_tokens`: of finished answers that are
    kept for all sequences of an engine, 0: each sequence sees its own text only. Raises InputError for limits out of range.
    """

    length: int = 15
    nodes: int = 24
    max_tokens: int = 2**18

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("nodes", 1), ("max_tokens", 0)):
            if getattr(self, name) < least:
                raise InputError(f"suffix.{name}={getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True)
class SuffixTrees:
    """Candidates for each sequence, parents before children.

    `tokens`: [B, M] int64, -1 where a place is empty; `parents`: [B, M] int64, places in the same row, -1 for the root;
    `matches`: [B, M] int64, class of the match that the path to the parent makes; `shares`: [B, M] float64, of the occurrences
    of the parent's path, smoothed: few occurrences never make it 1; `depth`: of the deepest candidate.
    """

    tokens: Ints
    parents: Ints
    matches: Ints
    shares: Floats
    depth: int


Candidate = tuple[int, int, int, float]
"""Token, parent (a place in the list, -1: the root), matched tokens, smoothed share."""


class SuffixTexts:
    """The text of the sequence in each of `rows`, and the finished answers `shared`, None: those are not kept."""

    def __init__(self, drafter: SuffixDrafter, rows: int, shared: SuffixIndex | None) -> None:
        self.drafter, self.shared = drafter, shared
        self._texts: list[_Text | None] = [None] * rows

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        """A new sequence takes `row`."""
        self._texts[row] = _Text(prompt_ids)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """The answer in `row` grows."""
        text = self._texts[row]
        assert text is not None
        text.extend(tokens)

    def move(self, source: int, target: int) -> None:
        """The sequence of row `source` continues in row `target`, whose own has ended."""
        self._texts[target] = self._texts[source]

    def end(self, row: int) -> None:
        """The answer in `row` is finished: it is kept for other sequences."""
        text = self._texts[row]
        if text is not None and self.shared is not None and len(text.tokens) > text.prompt:
            begin = max(text.prompt - CONTEXT, 0)
            self.shared.extend(text.tokens[begin:], context=text.prompt - begin)
            self.shared.end_piece()
        self._texts[row] = None

    def draft(self, batch: int, length: int) -> SuffixTrees | None:
        """Candidates for rows 0 .. `batch` - 1, no path longer than `length`; None where there is none."""
        length = min(length, self.drafter.length)
        found = [self._candidates(text, length) if text is not None else [] for text in self._texts[:batch]]
        size = max(map(len, found))
        if size == 0:
            return None
        tokens, parents = np.full((batch, size), -1), np.full((batch, size), -1)
        matches, shares = np.zeros((batch, size), dtype=np.int64), np.zeros((batch, size))
        for row, candidates in enumerate(found):
            if candidates:
                columns = list(zip(*candidates, strict=True))
                tokens[row, :len(candidates)], parents[row, :len(candidates)] = columns[0], columns[1]
                matches[row, :len(candidates)] = [match_class(matched) for matched in columns[2]]
                shares[row, :len(candidates)] = columns[3]
        return SuffixTrees(tokens, parents, matches, shares, length)

    def _candidates(self, text: _Text, length: int) -> list[Candidate]:
        context = text.tokens[-LONGEST_MATCH:]
        places = [(matched, text.index, place) for matched, place in text.index.find(context)]
        if self.shared is not None:
            places += [(matched, self.shared, place) for matched, place in self.shared.find(context)]
        if not places:
            return []
        if len(places) > 1:
            places.sort(key=lambda one: -min(one[0], SATURATED))
        best = min(places[0][0], SATURATED)
        occurrences = list[Occurrence]()
        for matched, index, place in places[:MOST_PLACES]:
            tokens = index.following(place, length)
            if index is text.index and len(tokens) < length:  # text that repeats itself is drafted to full length, as LZ77 copies
                tokens = (tokens * (length // len(tokens) + 1))[:length]
            occurrences.append((SHORTER ** (best - min(matched, SATURATED)), matched, tokens))
        return grow(occurrences, self.drafter.nodes)


class _Text:
    """The text of one sequence; `prompt`: how many of `tokens` are its prompt."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.tokens, self.prompt, self.index = list(prompt_ids), len(prompt_ids), SuffixIndex(2**31)
        self.index.extend(self.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        self.index.extend(tokens)


Occurrence = tuple[float, int, list[int]]
"""An earlier occurrence of the context: how much it counts, how many tokens agree, and what followed."""
_Waiting = list[tuple[float, int, int, int, float, int, list[Occurrence]]]
"""-share of a path, order, parent, token, share, matched tokens, and the occurrences that it goes through."""


def grow(occurrences: Sequence[Occurrence], nodes: int) -> list[Candidate]:
    """The tree of the most frequent continuations, at most `nodes` of them: always the most frequent path next (SuffixDecoding's
    greedy expansion)."""
    grown: list[Candidate] = []
    waiting: _Waiting = []
    _push(waiting, 0, -1, 0, 1.0, max(one[1] for one in occurrences), list(occurrences))
    depths, order = [0], len(waiting)
    while waiting and len(grown) < nodes:
        path, _, parent, token, share, matched, members = heappop(waiting)
        depth = depths[parent + 1] + 1
        grown.append((token, parent, matched, share))
        depths.append(depth)
        order += _push(waiting, order, len(grown) - 1, depth, -path, matched + 1, members)
    return grown


def _push(waiting: _Waiting, order: int, parent: int, depth: int, path: float, matched: int, members: list[Occurrence]) -> int:
    """Put what follows after `depth` tokens of `members` among the `waiting`. `matched`: tokens that agree before it; returns how
    many there are."""
    escape = ESCAPE / (1 + matched)
    if len(members) == 1:
        weight, _, tokens = members[0]
        share = weight / (weight + escape)
        if depth >= len(tokens) or path * share < LEAST_SHARE:
            return 0
        heappush(waiting, (-path * share, order, parent, tokens[depth], share, matched, members))
        return 1
    groups: dict[int, list[Occurrence]] = {}
    total = escape
    for one in members:
        if len(one[2]) > depth:
            groups.setdefault(one[2][depth], []).append(one)
            total += one[0]
    number = 0
    for token, group in groups.items():
        share = sum(one[0] for one in group) / total
        if path * share >= LEAST_SHARE:
            most = matched if len(groups) == 1 else max(one[1] for one in group) + depth
            heappush(waiting, (-path * share, order + number, parent, token, share, most, group))
            number += 1
    return number
