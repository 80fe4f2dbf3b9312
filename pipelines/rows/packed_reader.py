"""Rows of a store as packed batches, with the base's log partitions if they are computed."""

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

ROW_TOKENS, LEAST_PROMPT = 1024, 32  # a longer row loses the beginning of its prompt, which keeps at least so many tokens
LOG_PARTITION_ROWS = 512  # positions whose logits are in memory at a time
ROWS_AT_ONCE = 1024  # rows whose log partitions are computed between two exchanges
LINE_TOKENS = 256
"""Width of a packed line, unless a row is longer: the cost of attention is the square of it."""


@dataclass(frozen=True)
class ProcessGroup:
    """The rank of this process, and the number of processes."""

    rank: int
    world_size: int


def cropped(row: FeatureRow) -> FeatureRow:
    """Cut the beginning of a long prompt, so that the row has `ROW_TOKENS` tokens if possible.

    The whole answer stays, and at least `LEAST_PROMPT` tokens before it. A packed line is as wide as its longest row, and the
    cost of attention is the square of its width.
    """
    cut = min(len(row.token_ids) - ROW_TOKENS, row.prompt_tokens - LEAST_PROMPT)
    if cut <= 0:
        return row
    log_partitions = None if row.log_partitions is None else row.log_partitions[cut:]
    return FeatureRow(row.token_ids[cut:], row.prompt_tokens - cut, row.hidden[cut:], log_partitions)


class RowReader:
    """Packed batches from a store, with the base's log partitions (logsumexp of the logits) if they are set."""

    def __init__(self, store: RowStore) -> None:
        self.store = store
        self.log_partitions: np.ndarray | None = None  # [tokens of the store] float32

    def pack(self, rows: Sequence[int] | np.ndarray) -> Packed:
        """Read rows by number and pack them into lines."""
        numbers = [int(row) for row in rows]
        read = [cropped(self._with_log_partitions(*pair)) for pair in zip(numbers, self.store.read_rows(numbers), strict=True)]
        return pack_rows(read, max(LINE_TOKENS, *(row.token_ids.shape[0] for row in read)))

    def _with_log_partitions(self, row: int, found: FeatureRow) -> FeatureRow:
        if self.log_partitions is None:
            return found
        offsets = self.store.index.offsets
        log_partitions = torch.from_numpy(np.array(self.log_partitions[offsets[row]:offsets[row + 1]]))
        return FeatureRow(found.token_ids, found.prompt_tokens, found.hidden, log_partitions)

    def compute_log_partitions(self, group: ProcessGroup, head: VocabHead, add_up: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Log partitions of all tokens, [sum] float32, mapped from a file.

        Each rank computes those of consecutive rows, so that it reads its part of the blocks, and `add_up` sums a tensor over
        ranks. At most `ROWS_AT_ONCE` rows are in memory, so that memory does not grow with the data.
        """
        offsets, ranks = self.store.index.offsets, group.world_size
        with tempfile.TemporaryFile() as file:
            file.truncate(4 * len(self.store.index.tokens))
            whole = disk_array(file, np.float32, len(self.store.index.tokens))
        cuts = np.searchsorted(offsets, offsets[-1] * np.arange(ranks + 1) // ranks)  # ranks have as many tokens
        at_once = max(1, ROWS_AT_ONCE // ranks)
        for start in range(0, int(np.diff(cuts).max()), at_once):
            begins = np.minimum(cuts[:-1] + start, cuts[1:])  # of every rank, as its result comes here too
            ends = np.minimum(begins + at_once, cuts[1:])
            into = np.concatenate([[0], np.cumsum(offsets[ends] - offsets[begins])])
            found = torch.zeros(int(into[-1]), dtype=torch.float32)
            places, parts = [], []
            for row in range(int(begins[group.rank]), int(ends[group.rank])):
                (read,) = self.store.read_rows([row])
                begin = max(read.prompt_tokens - 1, 0)  # no head learns from earlier positions
                first = int(into[group.rank] + offsets[row] - offsets[begins[group.rank]])
                places.append(torch.arange(first + begin, first + len(read.token_ids)))
                parts.append(read.hidden[begin:].clone())  # a copy: a view would keep the whole row in memory
            if parts:  # in one call, since most of a call's time is spent on the vocabulary's matrix, whatever the rows
                hidden = torch.cat(parts).to(head.weight.device)
                found[torch.cat(places)] = log_partition(hidden, head, LOG_PARTITION_ROWS).cpu()
            summed = add_up(found).numpy()
            for rank in range(ranks):
                whole[offsets[begins[rank]]:offsets[ends[rank]]] = summed[into[rank]:into[rank + 1]]
        return whole


def load_log_partitions(path: Path, tokens: int) -> np.ndarray | None:
    """The log partitions that an earlier training has cached, or None."""
    if not path.exists():
        return None
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return found if found.shape == (tokens,) else None
