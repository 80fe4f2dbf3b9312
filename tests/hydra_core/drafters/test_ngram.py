"""Prompt lookup against the search it stands for."""

from __future__ import annotations

import random

import pytest

from hydra_core.drafters.ngram import NgramDrafter, NgramIndex


def slow_draft(tokens: list[int], drafter: NgramDrafter, length: int) -> list[int]:
    """Longest match first, latest occurrence first, by looking everywhere."""
    for size in range(drafter.max_match, drafter.min_match - 1, -1):
        if len(tokens) <= size:
            continue
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start:start + size] == tokens[-size:]:
                text = list(tokens)
                for i in range(length):  # may run into what it has just drafted
                    text.append(text[start + size + i])
                return text[len(tokens):]
    return []


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
            drafted = index.draft(6)
            assert drafted == slow_draft(tokens, drafter, 6)
            found += bool(drafted)
    assert found > 500


def test_repetition_is_drafted_to_full_length() -> None:
    index = NgramIndex(NgramDrafter(min_match=2))
    index.extend([7, 8, 9, 7, 8])
    assert index.draft(8) == [9, 7, 8, 9, 7, 8, 9, 7]


def test_nothing_to_go_on() -> None:
    index = NgramIndex(NgramDrafter(min_match=2))
    assert index.draft(4) == []
    index.extend([1, 2, 3, 4])
    assert index.draft(4) == []


def test_bad_settings() -> None:
    for values in ({"min_match": 0}, {"min_match": 3, "max_match": 2}, {"length": 0}):
        with pytest.raises(ValueError, match="ngram"):
            NgramDrafter(**values)
