"""The frequency-ranked draft vocabulary."""

from __future__ import annotations

import pytest
import torch

from hydra_core.heads import DraftVocab

COUNTS = torch.tensor([5, 0, 9, 1, 9, 0, 2])


def test_most_frequent_first_stop_ids_always_in() -> None:
    vocab = DraftVocab.rank(COUNTS, 3, (5,))
    assert set(vocab.ids.tolist()) == {2, 4, 5}
    assert vocab.ids.tolist()[:2] == [2, 4]  # ties by id
    assert vocab.coverage(COUNTS) == pytest.approx(18 / 26)


def test_index_is_the_inverse() -> None:
    vocab = DraftVocab.rank(COUNTS, 4, (1,))
    for token in range(7):
        place = int(vocab.index_of[token])
        assert (place == -1) == (token not in vocab.ids.tolist())
        assert place == -1 or int(vocab.ids[place]) == token


@pytest.mark.parametrize("size", [0, 7, 99])
def test_the_full_vocabulary(size: int) -> None:
    vocab = DraftVocab.rank(COUNTS, size, (5,))
    assert sorted(vocab.ids.tolist()) == list(range(7)) and vocab.coverage(COUNTS) == 1.0


def test_nothing_counted() -> None:
    assert DraftVocab.rank(torch.zeros(5), 2, (4,)).coverage(torch.zeros(5)) == 0.0


def test_a_smaller_one_keeps_the_most_frequent_and_what_must_be_there() -> None:
    vocab = DraftVocab(torch.tensor([7, 3, 9, 1, 2, 8]), 12)
    assert vocab.smaller(3, (2, 5)).ids.tolist() == [7, 3, 2]  # in their order; 5 was never here
    assert vocab.smaller(3).ids.tolist() == [7, 3, 9]
    assert vocab.smaller(1, (2, 8)).ids.tolist() == [2, 8]
    assert vocab.smaller(20, (2,)).ids.tolist() == vocab.ids.tolist()
