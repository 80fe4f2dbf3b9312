"""The draft vocabulary: only frequent tokens may be drafted, so a head costs a fraction of the base's projection.

Restricting drafts is lossless: verification still considers every token (FR-Spec, arXiv 2502.14856).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class DraftVocab:
    """Tokens that may be drafted, most frequent first.

    `ids`: [Vd] int64 distinct token ids; `size`: size V of the whole vocabulary. Raises ValueError for ids that
    repeat or lie outside the vocabulary.
    """

    def __init__(self, ids: Tensor, size: int) -> None:
        if ids.dim() != 1 or not len(ids) or len(torch.unique(ids)) != len(ids):
            raise ValueError("a draft vocabulary is a list of distinct token ids")
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise ValueError(f"a draft vocabulary id lies outside the vocabulary of {size}")
        self.ids, self.size = ids.to(torch.int64), size

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def rank(cls, counts: Tensor, size: int, always: Sequence[int] = ()) -> DraftVocab:
        """The `size` most frequent tokens by `counts` [V], ties to the lower id; `always`: ids that are included in any case.

        `size` 0 takes the whole vocabulary, in its own order.
        """
        vocabulary = len(counts)
        if size == 0 or size >= vocabulary:
            return cls(torch.arange(vocabulary), vocabulary)
        wanted = counts.to(torch.int64).clone()
        wanted[list(always)] = torch.iinfo(torch.int64).max
        order = torch.sort(wanted, descending=True, stable=True).indices[:size]
        by_count = torch.sort(counts[order].to(torch.int64), descending=True, stable=True).indices
        return cls(order[by_count], vocabulary)

    def smaller(self, size: int, always: Sequence[int] = ()) -> DraftVocab:
        """The `size` most frequent of these tokens; `always`: ids that are kept in any case, where they are here."""
        needed = torch.isin(self.ids, torch.tensor(list(always), dtype=torch.int64))
        others = (~needed).cumsum(0) <= size - int(needed.sum())  # tokens up to this one
        return DraftVocab(self.ids[needed | others], self.size)

    @cached_property
    def index_of(self) -> Tensor:
        """[V] int64: a token's index in the draft vocabulary, -1 outside it."""
        with torch.inference_mode(False):  # it may be made during validation and used in a training step
            index = torch.full((self.size,), -1, dtype=torch.int64)
            index[self.ids] = torch.arange(len(self.ids))
        return index

    @cached_property
    def whole(self) -> bool:
        """Whether it is the whole vocabulary in its own order, so that ids are indices."""
        return len(self) == self.size and torch.equal(self.ids.cpu(), torch.arange(self.size))

    def coverage(self, counts: Tensor) -> float:
        """Share of the counted tokens that are in the draft vocabulary; 0 when nothing is counted."""
        total = int(counts.sum())
        return int(counts[self.ids].sum()) / total if total else 0.0
