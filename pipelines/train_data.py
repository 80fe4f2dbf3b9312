"""The rows of one training run: what each step holds, how it is dealt to ranks, and by what its loss is divided."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from pipelines.features import BatchOrder, FeatureStore, share_of

LINE_TOKENS = 256
"""Width of a packed line unless a row is longer: attention over a line costs its square."""


@dataclass(frozen=True)
class Share:
    """Which rank of how many."""

    rank: int
    world: int


class RowReader:
    """Packed batches from a store, with the base's softmax normalisers where they are known."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self.normalisers: np.ndarray | None = None  # [tokens of the store] float32

    def pack(self, rows: Sequence[int] | np.ndarray) -> Packed:
        """Rows by number, packed into lines."""
        read = [self._row(int(row)) for row in rows]
        return pack_rows(read, max(LINE_TOKENS, *(row.token_ids.shape[0] for row in read)))

    def _row(self, row: int) -> FeatureRow:
        found = self.store.read(row)
        if self.normalisers is None:
            return found
        offsets = self.store.index.offsets
        known = torch.from_numpy(self.normalisers[offsets[row]:offsets[row + 1]])
        return FeatureRow(found.token_ids, found.prompt_tokens, found.hidden, known)

    def compute_normalisers(self, rows: Sequence[int], head: VocabHead) -> np.ndarray:
        """Normalisers of `rows` in an array of the whole store, zero elsewhere: shares of several ranks add up."""
        found = np.zeros(len(self.store.index.tokens), np.float32)
        for row in rows:
            read = self.store.read(row)
            first = int(self.store.index.offsets[row])
            begin = max(read.prompt_tokens - 1, 0)  # earlier positions teach no head
            hidden = read.hidden[begin:].to(head.weight.device)
            found[first + begin:first + len(read.token_ids)] = log_normalisers(hidden, head).cpu().numpy()
        return found


def valid_counts(store: FeatureStore, draft_vocab: DraftVocab, heads: HeadsConfig) -> np.ndarray:
    """Positions whose loss counts, for each row and head: [rows, K] int64.

    Every rank holds all token ids, so the divisor of a step's loss needs no communication.
    """
    index = store.index
    if heads.loss == "teacher":
        counted = np.ones(len(index.tokens), np.int64)
    else:
        counted = (draft_vocab.index_of.numpy()[index.tokens] >= 0).astype(np.int64)
    before = np.concatenate([[0], np.cumsum(counted)])
    counts = np.zeros((len(store), heads.num_heads), np.int64)
    spans = zip(index.offsets[:-1], index.prompt_tokens, index.lengths, strict=True)
    for row, (start, prompt, tokens) in enumerate(spans):
        for head in range(heads.num_heads):
            asked = target_range(head, int(prompt), int(tokens))
            counts[row, head] = before[start + asked.stop] - before[start + asked.start] if len(asked) else 0
    return counts


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step, and the whole step's valid positions per head [K] int64."""

    step: int
    packed: Packed
    counts: Tensor


class StepBatches:
    """Batches of steps in order, the next one read while the current one is computed."""

    def __init__(self, reader: RowReader, order: BatchOrder, counts: np.ndarray, share: Share) -> None:
        self.reader, self.order, self.counts, self.share = reader, order, counts, share

    def batch(self, step: int) -> Batch:
        rows = self.order.rows(step)
        mine = share_of(rows, self.reader.store.index.lengths, self.share.rank, self.share.world)
        return Batch(step, self.reader.pack(mine), torch.from_numpy(self.counts[rows].sum(0)))

    def between(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches of steps start .. stop - 1."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Batch] | None = pool.submit(self.batch, start) if start < stop else None
            for step in range(start, stop):
                assert ahead is not None
                batch = ahead.result()
                ahead = pool.submit(self.batch, step + 1) if step + 1 < stop else None
                yield batch


def validation_groups(store: FeatureStore, rows: int, per_batch: int, seed: int,
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
    found: np.ndarray = np.load(path, allow_pickle=False)
    return found if found.shape == (tokens,) else None
