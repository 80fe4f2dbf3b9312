"""Rows of a store as packed batches, with the base's log partition where it is known."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hydra_core.base.vocabulary import VocabHead
from hydra_core.training.losses import log_partition
from hydra_core.training.packing import FeatureRow, Packed, pack_rows
from pipelines.rows.row_index import RowStore, disk_array

ROW_TOKENS, LEAST_PROMPT = 1024, 32  # of a row longer than that the last are learned from, and so many of its prompt
LOG_PARTITION_ROWS = 512  # positions whose logits are held at a time
ROWS_AT_ONCE = 1024  # rows whose normalisers are computed between two exchanges
LINE_TOKENS = 256
"""Width of a packed line unless a row is longer: attention over a line costs its square."""


@dataclass(frozen=True)
class ProcessGroup:
    """Which rank of how many."""

    rank: int
    world_size: int


def cropped(row: FeatureRow) -> FeatureRow:
    """A row without the beginning of a long prompt: attention over a line costs its square, and one line is as wide as the
    longest row. All of the answer stays, and `LEAST_PROMPT` tokens before it."""
    cut = min(len(row.token_ids) - ROW_TOKENS, row.prompt_tokens - LEAST_PROMPT)
    if cut <= 0:
        return row
    known = None if row.log_partitions is None else row.log_partitions[cut:]
    return FeatureRow(row.token_ids[cut:], row.prompt_tokens - cut, row.hidden[cut:], known)


class RowReader:
    """Packed batches from a store, with the base's softmax normalisers where they are known."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self.log_partitions: np.ndarray | None = None  # [tokens of the store] float32

    def pack(self, rows: Sequence[int] | np.ndarray) -> Packed:
        """Rows by number, packed into lines."""
        numbers = [int(row) for row in rows]
        read = [cropped(self._with_log_partitions(*pair)) for pair in zip(numbers, self.store.read_rows(numbers), strict=True)]
        return pack_rows(read, max(LINE_TOKENS, *(row.token_ids.shape[0] for row in read)))

    def _with_log_partitions(self, row: int, found: FeatureRow) -> FeatureRow:
        if self.log_partitions is None:
            return found
        offsets = self.store.index.offsets
        known = torch.from_numpy(np.array(self.log_partitions[offsets[row]:offsets[row + 1]]))
        return FeatureRow(found.token_ids, found.prompt_tokens, found.hidden, known)

    def compute_log_partitions(self, group: ProcessGroup, head: VocabHead, add_up: Callable[[Tensor], Tensor]) -> np.ndarray:
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
            for row in range(start + group.rank, stop, group.world_size):
                (read,) = self.store.read_rows([row])
                begin = max(read.prompt_tokens - 1, 0)  # earlier positions teach no head
                first = int(offsets[row] - offsets[start])
                places.append(torch.arange(first + begin, first + len(read.token_ids)))
                parts.append(read.hidden[begin:].clone())  # of its own: else the whole row stays with it
            if parts:  # together: a projection of few rows takes as long as one of many to turn the vocabulary's matrix
                hidden = torch.cat(parts).to(head.weight.device)
                found[torch.cat(places)] = log_partition(hidden, head, LOG_PARTITION_ROWS).cpu()
            whole[offsets[start]:offsets[stop]] = add_up(found).numpy()
        return whole


def load_log_partitions(path: Path, tokens: int) -> np.ndarray | None:
    """What an earlier start of the same run kept, or None."""
    if not path.exists():
        return None
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return found if found.shape == (tokens,) else None
