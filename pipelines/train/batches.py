"""The batches of a training run: the rows of each step, each rank's part of them, and the divisor of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydra_core.heads import DraftVocab, HeadsConfig
from hydra_core.training.alignment import target_range
from hydra_core.training.packing import Packed
from pipelines.rows.batch_order import BatchOrder, share_of
from pipelines.rows.packed_reader import ProcessGroup, RowReader
from pipelines.rows.row_index import RowStore


def valid_counts(store: RowStore, draft_vocab: DraftVocab, heads: HeadsConfig) -> np.ndarray:
    """Number of positions with a loss, for each row and head: [rows, K] int64.

    Every rank knows all token ids, so that the divisor of a step's loss needs no communication.
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
    """One rank's part of a step, in pieces that are computed one after the other.

    `counts`: [K] int64, positions with a loss of the whole step, by head; `counted`: how many of the pieces count, the first
    ones: the others stand in for rows that there are not, so that all ranks take part in the same exchanges.
    """

    step: int
    pieces: tuple[Packed, ...]
    counts: Tensor
    counted: int

    @property
    def padding(self) -> float:
        """Share of padding among all tokens of the batch."""
        laid = sum(piece.token_ids.numel() for piece in self.pieces)
        return 1 - sum(int(piece.spans.lengths.sum()) for piece in self.pieces) / laid


class StepBatches:
    """Batches of steps in order, `accumulate` pieces in each. The next batch is read while the current one is computed."""

    def __init__(self, reader: RowReader, order: BatchOrder, counts: np.ndarray, group: ProcessGroup,
                 accumulate: int = 1) -> None:
        self.reader, self.order, self.counts, self.group, self.accumulate = reader, order, counts, group, accumulate

    def batch(self, step: int) -> Batch:
        rows = self.order.rows(step)
        dealt = [part for part in self.order.pieces(step, self.group, self.accumulate) if len(part)]
        near = np.concatenate(dealt) if dealt else rows
        shortest = near[np.argmin(self.order.lengths[near])][None]
        pieces = [self.reader.pack(part) for part in dealt + [shortest] * (self.accumulate - len(dealt))]
        return Batch(step, tuple(pieces), torch.from_numpy(self.counts[rows].sum(0)), len(dealt))

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
                      group: ProcessGroup) -> list[tuple[np.ndarray, bool]]:
    """Row numbers of this rank's held-out batches, each with whether it counts; the same at every validation.

    All ranks have the same number of batches, so that they take part in the same collectives: a rank with fewer rows repeats a
    batch that does not count.
    """
    chosen = store.sample(rows, seed)
    mine = share_of(chosen, store.index.lengths, group.rank, group.world_size)
    groups = [mine[start:start + per_batch] for start in range(0, len(mine), per_batch)]
    filler = groups[0] if groups else chosen[:1]
    largest_share = -(-len(chosen) // group.world_size)
    needed = -(-largest_share // per_batch)
    return [(groups[i], True) if i < len(groups) else (filler, False) for i in range(needed)]
