"""Prompt lookup against a plain search."""

from __future__ import annotations

import random

import pytest

from hydra_core.proposers.ngram import KEPT_ENDS, LONGEST_MATCH, Match, NgramDrafter, NgramIndex


def slow_match(tokens: list[int], drafter: NgramDrafter, length: int) -> Match:
    """Longest n-gram first; among its latest occurrences the one with the longest agreement, then the latest."""
    for size in range(drafter.max_match, drafter.min_match - 1, -1):
        starts = [start for start in range(len(tokens) - size) if tokens[start:start + size] == tokens[-size:]][-KEPT_ENDS:]
        if not starts:
            continue

        def agreeing(end: int) -> int:
            count = 0
            while count < min(end, LONGEST_MATCH) and tokens[end - 1 - count] == tokens[len(tokens) - 1 - count]:
                count += 1
            return count

        end = max((start + size for start in starts), key=lambda end: (agreeing(end), end))
        text = list(tokens)
        for i in range(length):  # may run into what it has just drafted
            text.append(text[end + i])
        return Match(tuple(text[len(tokens):]), agreeing(end))
    return Match()


def test_equals_the_search() -> None:
    dice = random.Random(0)
    found = 0
    for _ in range(60):
        drafter = NgramDrafter(max_match=dice.randint(2, 4), min_match=dice.randint(1, 2), length=6)
        index = NgramIndex(drafter)
        tokens: list[int] = []
        while len(tokens) < 60:
            fresh = [dice.randrange(4) for _ in range(dice.randint(1, 5))]  # as a step emits them
            index.extend(fresh)
            tokens += fresh
            drafted = index.match(6)
            assert drafted == slow_match(tokens, drafter, 6)
            found += bool(drafted.matched)
    assert found > 500


def test_repetition_is_drafted_to_full_length() -> None:
    index = NgramIndex(NgramDrafter(min_match=2))
    index.extend([7, 8, 9, 7, 8])
    assert index.match(8) == Match((9, 7, 8, 9, 7, 8, 9, 7), 2)


def test_the_longer_agreement_wins_over_the_later_one() -> None:
    index = NgramIndex(NgramDrafter(max_match=2))
    index.extend([5, 1, 2, 3, 9, 4, 2, 3, 8, 5, 1, 2, 3])
    assert index.match(2) == Match((9, 4), 4)


def test_nothing_to_go_on() -> None:
    index = NgramIndex(NgramDrafter(min_match=2))
    assert index.match(4) == Match()
    index.extend([1, 2, 3, 4])
    assert index.match(4) == Match()


def test_bad_settings() -> None:
    for values in ({"min_match": 0}, {"min_match": 3, "max_match": 2}, {"length": 0}):
        with pytest.raises(ValueError, match="ngram"):
            NgramDrafter(**values)
