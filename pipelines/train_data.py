"""The rows of one training run: what each step holds, how it is dealt to ranks, and by what its loss is divided."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hydra_core.base.vocabulary import VocabHead
from hydra_core.drafters import DraftVocab, HeadsConfig
from hydra_core.training.alignment import target_range
from hydra_core.training.losses import log_normalisers
from hydra_core.training.packing import FeatureRow, Packed, pack_rows
from pipelines.features import BatchOrder, share_of
from pipelines.row_index import RowStore, disk_array

ROW_TOKENS, LEAST_PROMPT = 1024, 32  # of a row longer than that the last are learned from, and so many of its prompt
NORMALISER_ROWS = 512  # positions whose logits are held at a time
ROWS_AT_ONCE = 1024  # rows whose normalisers are computed between two exchanges
LINE_TOKENS = 256
"""Width of a packed line unless a row is longer: attention over a line costs its square."""


@dataclass(frozen=True)
class Share:
    """Which rank of how many."""

    rank: int
    world: int


def cropped(row: FeatureRow) -> FeatureRow:
    """A row without the beginning of a long prompt: attention over a line costs its square, and one line is as wide as the
    longest row. All of the answer stays, and `LEAST_PROMPT` tokens before it."""
    cut = min(len(row.token_ids) - ROW_TOKENS, row.prompt_tokens - LEAST_PROMPT)
    if cut <= 0:
        return row
    known = None if row.normalisers is None else row.normalisers[cut:]
    return FeatureRow(row.token_ids[cut:], row.prompt_tokens - cut, row.hidden[cut:], known)


class RowReader:
    """Packed batches from a store, with the base's softmax normalisers where they are known."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self.normalisers: np.ndarray | None = None  # [tokens of the store] float32

    def pack(self, rows: Sequence[int] | np.ndarray) -> Packed:
        """Rows by number, packed into lines."""
        numbers = [int(row) for row in rows]
        read = [cropped(self._with_normalisers(*pair)) for pair in zip(numbers, self.store.read_rows(numbers), strict=True)]
        return pack_rows(read, max(LINE_TOKENS, *(row.token_ids.shape[0] for row in read)))

    def _with_normalisers(self, row: int, found: FeatureRow) -> FeatureRow:
        if self.normalisers is None:
            return found
        offsets = self.store.index.offsets
        known = torch.from_numpy(np.array(self.normalisers[offsets[row]:offsets[row + 1]]))
        return FeatureRow(found.token_ids, found.prompt_tokens, found.hidden, known)

    def compute_normalisers(self, share: Share, head: VocabHead, add_up: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Normalisers of all tokens, [sum] float32 mapped from a file: each rank computes its share, `add_up` sums them.

        A stretch of rows at a time, so that memory does not grow with the data.
        """
        offsets = self.store.index.offsets
        with tempfile.TemporaryFile() as file:
            file.truncate(4 * len(self.store.index.tokens))
            whole = disk_array(file, np.float32, len(self.store.index.tokens))
        for start in range(0, len(self.store), ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, len(self.store))
            found = torch.zeros(int(offsets[stop] - offsets[start]), dtype=torch.float32)
            places, parts = [], []
            for row in range(start + share.rank, stop, share.world):
                (read,) = self.store.read_rows([row])
                begin = max(read.prompt_tokens - 1, 0)  # earlier positions teach no head
                first = int(offsets[row] - offsets[start])
                places.append(torch.arange(first + begin, first + len(read.token_ids)))
                parts.append(read.hidden[begin:].clone())  # of its own: else the whole row stays with it
            if parts:  # together: a projection of few rows takes as long as one of many to turn the vocabulary's matrix
                hidden = torch.cat(parts).to(head.weight.device)
                found[torch.cat(places)] = log_normalisers(hidden, head, NORMALISER_ROWS).cpu()
            whole[offsets[start]:offsets[stop]] = add_up(found).numpy()
        return whole


def valid_counts(store: RowStore, draft_vocab: DraftVocab, heads: HeadsConfig) -> np.ndarray:
    """Positions whose loss counts, for each row and head: [rows, K] int64.

    Every rank knows all token ids, so the divisor of a step's loss needs no communication.
    """
    index, index_of = store.index, draft_vocab.index_of.numpy()
    counts = np.zeros((len(store), heads.num_heads), np.int64)
    for row, (prompt, tokens) in enumerate(zip(index.prompt_tokens, index.lengths, strict=True)):
        asked = [target_range(head, int(prompt), int(tokens)) for head in range(heads.num_heads)]
        if heads.reads_teacher:
            counts[row] = [len(one) for one in asked]
        else:
            drafted = index_of[store.token_ids(row)] >= 0
            counts[row] = [int(drafted[one.start:one.stop].sum()) for one in asked]
    return counts


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step, in pieces computed one after the other, and the whole step's valid positions per head
    [K] int64.
    """

    step: int
    pieces: tuple[Packed, ...]
    counts: Tensor

    @property
    def padding(self) -> float:
        """Share of the laid-out tokens that are none."""
        laid = sum(piece.token_ids.numel() for piece in self.pieces)
        return 1 - sum(int(piece.spans.lengths.sum()) for piece in self.pieces) / laid


class StepBatches:
    """Batches of steps in order, the next one read while the current one is computed; `accumulate` pieces in each."""

    def __init__(self, reader: RowReader, order: BatchOrder, counts: np.ndarray, share: Share, accumulate: int = 1) -> None:
        self.reader, self.order, self.counts, self.share, self.accumulate = reader, order, counts, share, accumulate

    def batch(self, step: int) -> Batch:
        rows, first = self.order.rows(step), self.share.rank * self.accumulate
        lengths, parts = self.reader.store.index.lengths, self.share.world * self.accumulate
        pieces = tuple(self.reader.pack(share_of(rows, lengths, first + piece, parts)) for piece in range(self.accumulate))
        return Batch(step, pieces, torch.from_numpy(self.counts[rows].sum(0)))

    def between(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps start .. stop - 1."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Batch] | None = pool.submit(self.batch, start) if start < stop else None
            for step in range(start, stop):
                assert ahead is not None
                batch = ahead.result()
                ahead = pool.submit(self.batch, step + 1) if step + 1 < stop else None
                yield batch


def validation_groups(store: RowStore, rows: int, per_batch: int, seed: int,
                      share: Share) -> list[tuple[np.ndarray, bool]]:
    """Row numbers of this rank's held-out batches, each with whether it counts; the same at every validation.

    Every rank has as many batches (the last may be a repetition that does not count): collectives stay in step.
    """
    chosen = store.sample(rows, seed)
    mine = share_of(chosen, store.index.lengths, share.rank, share.world)
    groups = [mine[start:start + per_batch] for start in range(0, len(mine), per_batch)]
    filler = groups[0] if groups else chosen[:1]
    largest_share = -(-len(chosen) // share.world)
    needed = -(-largest_share // per_batch)
    return [(groups[i], True) if i < len(groups) else (filler, False) for i in range(needed)]


def load_normalisers(path: Path, tokens: int) -> np.ndarray | None:
    """What an earlier start of the same run kept, or None."""
    if not path.exists():
        return None
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return found if found.shape == (tokens,) else None
