"""Drafts from earlier answers, against the same written plainly: what is found, counted, grown, merged, and given back."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_core.errors import InputError
from hydra_core.proposers.acceptance import (
    BIN_EDGES,
    COPIED_PRIOR,
    SINGLE_SHARE,
    STRENGTH_EDGES,
    AcceptanceEstimator,
    match_class,
)
from hydra_core.proposers.candidate_tree import CandidateTrees, merge_suffix
from hydra_core.proposers.suffix import CONTEXT, ESCAPE, LEAST_SHARE, SuffixDrafter, SuffixTexts, SuffixTrees, grow
from hydra_core.proposers.suffix_index import END, LONGEST_MATCH, VISITS, SuffixIndex

GREEDY = np.array([False])
PIECES = st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=14), st.integers(0, 4)), max_size=8)


def kept(pieces: list[tuple[list[int], int]], capacity: int) -> tuple[int, list[int], set[int]]:
    """The first place that is kept, all tokens ever added with the ends of pieces, and the places that may be found."""
    tokens: list[int] = []
    places = set()
    for piece, context in pieces:
        places |= set(range(len(tokens) + context, len(tokens) + len(piece)))
        tokens += [*piece, END] if piece else []
    return max(len(tokens) - capacity, 0), tokens, places


@given(PIECES, st.lists(st.integers(0, 3), max_size=12), st.integers(5, 60), st.sampled_from([(3, 2), (4, 1), (2,)]))
def test_what_is_found_equals_a_search(pieces: list[tuple[list[int], int]], context: list[int], capacity: int,
                                       grams: tuple[int, ...]) -> None:
    """The longest n-gram that occurred: all places with it that are kept, latest first, with how far they agree, and what
    follows."""
    index = SuffixIndex(capacity, grams)
    for piece, known in pieces:
        index.extend(piece, known)
        index.end_piece()
    oldest, tokens, places = kept(pieces, capacity)
    agreeing = {}
    for place in sorted(places, reverse=True):
        count = 0
        while (count < min(len(context), LONGEST_MATCH) and place - 1 - count >= oldest
               and tokens[place - 1 - count] == context[-1 - count]):
            count += 1
        agreeing[place] = count if place >= oldest else 0
    wanted: list[tuple[int, int]] = []
    for size in grams:
        wanted = wanted or [(count, place) for place, count in agreeing.items() if count >= size]
    found = index.find(context)
    assert found == wanted[:VISITS]
    for _, place in found:
        rest = tokens[place:place + 5]
        assert index.following(place, 5) == (rest[:rest.index(END)] if END in rest else rest)


@given(st.lists(st.lists(st.integers(0, 4), max_size=9), max_size=30), st.integers(1, 25))
def test_memory_is_bounded_and_given_back(pieces: list[list[int]], capacity: int) -> None:
    index = SuffixIndex(capacity)
    for piece in pieces:
        index.extend(piece)
        index.end_piece()
        assert len(index) <= capacity
        for latest, before in zip(index._latest, index._before, strict=True):
            assert len(before) == len(index) and len(latest) <= capacity
            assert all(place >= index.oldest for place in latest.values())
    index.forget()
    assert len(index) == 0 and not any(index._latest) and index.find([1, 2, 3]) == []


def test_the_latest_places_alone_are_looked_at() -> None:
    index = SuffixIndex(10_000)
    for number in range(100):
        index.extend([1, 2, 3, number])
        index.end_piece()
    found = index.find([1, 2, 3])
    assert [index.following(place, 1) for _, place in found] == [[number] for number in range(99, 99 - VISITS, -1)]


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=12), st.integers(1, 40), st.integers(2, 9))
def test_a_grown_tree_has_the_counts(texts: list[list[int]], nodes: int, matched: int) -> None:
    """Each share is a count over that of the path before it and of what was never seen; the most frequent paths come first."""
    grown = grow([(1.0, matched, text) for text in texts], nodes)
    counts = Counter(tuple(text[:length]) for text in texts for length in range(1, len(text) + 1))
    paths: list[tuple[int, ...]] = []
    shares: list[float] = []
    for token, parent, agrees, share in grown:
        above = paths[parent] if parent >= 0 else ()
        siblings = sum(count for path, count in counts.items() if path[:-1] == above)
        assert share == pytest.approx(counts[*above, token] / (siblings + ESCAPE / (1 + matched + len(above))))
        assert agrees == matched + len(above)
        paths.append((*above, token))
        shares.append(share * (shares[parent] if parent >= 0 else 1.0))
    assert len(set(paths)) == len(paths) <= nodes and shares == sorted(shares, reverse=True)
    assert min(shares, default=1) >= LEAST_SHARE
    if len(paths) < nodes:  # nothing frequent is left out
        for path, count in counts.items():
            siblings = sum(other for one, other in counts.items() if one[:-1] == path[:-1])
            if path not in paths and (len(path) == 1 or path[:-1] in paths):
                before = shares[paths.index(path[:-1])] if len(path) > 1 else 1.0
                assert before * count / (siblings + ESCAPE / (matched + len(path))) < LEAST_SHARE


def test_the_more_frequent_continuation_is_the_more_probable_one() -> None:
    shared = SuffixIndex(1000)
    for answer in ([7, 8, 9, 1], [7, 8, 9, 1], [7, 8, 9, 1], [7, 8, 9, 2]):
        shared.extend(answer)
        shared.end_piece()
    texts = SuffixTexts(SuffixDrafter(), 1, shared)
    texts.admit(0, [5, 7, 8, 9])
    found = texts.draft(1, 4)
    assert found is not None and found.tokens[0].tolist() == [1, 2] and found.parents[0].tolist() == [-1, -1]
    assert found.shares[0].tolist() == pytest.approx([3 / (4 + ESCAPE / 4), 1 / (4 + ESCAPE / 4)])
    assert found.matches[0].tolist() == [match_class(3)] * 2


def test_an_answer_is_kept_once_it_has_ended_and_its_prompt_is_not() -> None:
    """Of the prompt only the end is kept, and nothing of it is ever drafted for another sequence."""
    prompt, answer = list(range(100, 130)), [1, 2, 3, 4, 5]
    shared = SuffixIndex(1000)
    texts = SuffixTexts(SuffixDrafter(), 3, shared)
    texts.admit(0, prompt)
    texts.extend(0, answer)
    texts.admit(1, [*prompt[-3:], 1, 2])
    assert texts.draft(2, 4) is None
    texts.move(0, 2)
    texts.end(2)
    assert len(shared) == CONTEXT + len(answer) + 1
    found = texts.draft(2, 4)
    assert found is not None and found.tokens[1].tolist() == [3, 4, 5] and found.tokens[0].tolist() == [-1] * 3
    texts.admit(0, prompt[-8:-4])
    assert texts.draft(1, 4) is None  # it would be prompt[-4]
    texts.end(0)  # cancelled before its first token
    assert len(shared) == CONTEXT + len(answer) + 1
    alone = SuffixTexts(SuffixDrafter(max_tokens=0), 1, None)
    alone.admit(0, [1, 2, 3])
    alone.end(0)
    alone.admit(0, [1, 2, 3])
    assert alone.draft(1, 4) is None


def test_own_text_that_repeats_itself_is_drafted_to_full_length() -> None:
    texts = SuffixTexts(SuffixDrafter(), 1, None)
    texts.admit(0, [7, 8, 9] * 6)
    found = texts.draft(1, 7)
    assert found is not None and found.tokens[0].tolist()[:7] == [7, 8, 9, 7, 8, 9, 7]
    assert found.parents[0].tolist()[:7] == [-1, 0, 1, 2, 3, 4, 5]


def test_merged_into_the_candidates_of_heads() -> None:
    """The same token after the same parent is one node, which becomes more probable; the others are added below their parents."""
    acceptance = AcceptanceEstimator(2, 1)
    first = acceptance.head_kinds(0, np.array([[0.5, 0.2]]), GREEDY)
    second = acceptance.head_kinds(1, np.array([[0.5]]), GREEDY)
    given_heads = acceptance.probabilities(np.concatenate((first, second), 1))[0]
    trees = CandidateTrees.roots(np.array([9])).extended(
        np.array([[1, 2, 3]]), np.array([[0, 0, 1]]), np.concatenate((first, second), 1),
        np.array([[given_heads[0], given_heads[1], given_heads[0] * given_heads[2]]]), 2)
    found = SuffixTrees(np.array([[1, 4, 3, 5, -1]]), np.array([[-1, -1, 0, 2, -1]]), np.array([[1, 1, 2, 2, 0]]),
                        np.array([[0.9, 0.05, 0.8, 0.7, 0.0]]), 3)
    merged = merge_suffix(trees, found, acceptance, GREEDY)
    assert merged.tokens[0].tolist() == [9, 1, 2, 3, -1, 4, -1, 5, -1]
    assert merged.parents[0, [5, 7]].tolist() == [0, 3] and merged.depth == 3

    def centre(value: float, edges: tuple[float, ...]) -> float:
        place = sum(value > edge for edge in edges)
        every = (0.0, *edges, 1.0)
        return (every[place] + every[place + 1]) / 2

    def agreed(share: float, probability: float) -> float:
        return 1 - (1 - centre(share, STRENGTH_EDGES)) * (1 - centre(probability, BIN_EDGES))

    one = agreed(0.9, 0.5)
    three = one * agreed(0.8, 0.5)
    alone = COPIED_PRIOR[1] * centre(0.05, BIN_EDGES) / SINGLE_SHARE
    wanted = [1.0, one, given_heads[1], three, 0.0, alone, 0.0,
              three * COPIED_PRIOR[2] * min(1.0, centre(0.7, BIN_EDGES) / SINGLE_SHARE), 0.0]
    assert merged.path_probs[0].tolist() == pytest.approx(wanted)
    assert merged.kinds[0, 0] == -1 and merged.kinds[0, 2] == first[0, 1] and len(set(merged.kinds[0].tolist())) == 6
    assert trees.path_probs[0, 1] == given_heads[0]  # the trees that were given stay as they are


def test_a_likelier_node_keeps_what_it_has() -> None:
    acceptance = AcceptanceEstimator(1, 1)
    trees = CandidateTrees.roots(np.array([9])).extended(np.array([[1]]), np.array([[0]]), np.array([[acceptance.half - 1]]),
                                                         np.array([[0.99]]), 1)
    found = SuffixTrees(np.array([[1, 2]]), np.array([[-1, 0]]), np.array([[0, 0]]), np.array([[0.1, 0.9]]), 2)
    merged = merge_suffix(trees, found, acceptance, GREEDY)
    assert merged.path_probs[0, 1] == 0.99 and merged.kinds[0, 1] == acceptance.half - 1
    assert merged.path_probs[0, 3] == pytest.approx(0.99 * COPIED_PRIOR[0])


def test_bad_settings() -> None:
    for values in ({"length": 0}, {"nodes": 0}, {"max_tokens": -1}):
        with pytest.raises(InputError, match="suffix"):
            SuffixDrafter(**values)
