"""Reading distilled rows: an index in memory, hidden states by row group, and an order that is a pure function.

    shard 0   [row group 0][row group 1] ...       a block = one row group of one shard
    epoch     blocks shuffled, grouped into windows of bounded size, rows shuffled inside a window

A window that holds all blocks gives a full shuffle. A larger data set is shuffled in windows that fit the block cache, so that
memory does not grow with the data. The order depends on (seed, position) alone: a trainer resumes from its step number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hydra_core.errors import InputError
from hydra_core.training.packing import FeatureRow
from pipelines.rows.row_index import HIDDEN_BYTES, Block, IndexReader, RowIndex, RowStore
from pipelines.rows.schemas import FEATURES

CACHE_BYTES = 512 << 20
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class FeatureStore(RowStore):
    """Rows of one split of a features folder. `width`: D; `dtype`: of the stored hidden states. Not thread safe."""

    def __init__(self, blocks: Sequence[Block], index: RowIndex, base: str, width: int, dtype: str,
                 cache_bytes: int) -> None:
        super().__init__(blocks, index, base)
        self.width, self.dtype = width, dtype
        self._budget = cache_bytes
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._held = 0

    @classmethod
    def open(cls, folder: Path, split: str, *, cache_bytes: int = CACHE_BYTES, share: float = 1.0) -> FeatureStore:
        """Index the shards `folder/*.parquet`.

        `cache_bytes`: limit of the hidden states in memory; `share`: share of the split's rows that is taken. Raises InputError
        for an empty folder, a file that is not a feature shard, rows of different bases, or a split without rows.
        """
        paths = sorted(folder.glob("*.parquet"))
        if not paths:
            raise InputError(f"{folder}: has no feature shards (*.parquet): run `hydra-heads distill` first")
        reader = IndexReader(split, FEATURES, share)
        for path in paths:
            reader.add(path)
        index = reader.build(folder)
        (kind,) = reader.kinds
        return cls(reader.blocks, index, *kind, cache_bytes)

    def read(self, row: int) -> FeatureRow:
        """One row with its hidden states. Raises InputError, which names the row, if their size does not match its columns."""
        index, tokens = self.index, self.token_ids(row)
        values = self._hidden(int(index.block[row]))[int(index.place[row])].as_buffer()
        dtype, size = _DTYPES[self.dtype], HIDDEN_BYTES[self.dtype]
        if len(values) != len(tokens) * self.width * size:
            block = self.blocks[int(index.block[row])]
            raise InputError(f"{block.path}: row {index.ids[row]}: hidden holds {len(values)} bytes, not "
                             f"{len(tokens)} x {self.width} x {size}: distill again")
        hidden = torch.frombuffer(bytearray(values), dtype=dtype).view(len(tokens), self.width)
        return FeatureRow(torch.from_numpy(tokens.astype(np.int64)), int(index.prompt_tokens[row]), hidden)

    def read_rows(self, rows: Sequence[int]) -> list[FeatureRow]:
        return [self.read(row) for row in rows]

    def _hidden(self, block: int) -> pa.ChunkedArray:
        if block in self._cache:
            self._cache.move_to_end(block)
            return self._cache[block]
        where = self.blocks[block]
        with pq.ParquetFile(where.path, memory_map=True) as file:
            column = file.read_row_group(where.group, columns=["hidden"]).column("hidden")
        while self._cache and self._held + column.nbytes > self._budget:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        self._cache[block] = column
        self._held += column.nbytes
        pa.default_memory_pool().release_unused()  # Arrow would keep the memory of earlier reads beside the cache
        return column


@dataclass(frozen=True)
class BatchOrder:
    """The rows of each step. `block`: [n] int64, the block of each row; `block_bytes`: [blocks] int64."""

    block: np.ndarray
    block_bytes: np.ndarray
    rows_per_step: int
    seed: int
    window_bytes: int = CACHE_BYTES

    @classmethod
    def of(cls, store: RowStore, rows_per_step: int, seed: int, window_bytes: int = CACHE_BYTES) -> BatchOrder:
        sizes = np.array([block.bytes for block in store.blocks])
        return cls(store.index.block, sizes, rows_per_step, seed, window_bytes)

    def total_steps(self, epochs: float) -> int:
        """Number of steps in which every row occurs at least `epochs` times."""
        return max(1, int(np.ceil(round(epochs * len(self.block) / self.rows_per_step, 9))))

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of step `step`, [rows_per_step] int64: consecutive places of one epoch after the other."""
        at = step * self.rows_per_step + np.arange(self.rows_per_step)
        epochs, places = at // len(self.block), at % len(self.block)
        # once for each epoch, as a look-up takes time in proportion to the rows
        order = {int(epoch): self._epoch(int(epoch)) for epoch in np.unique(epochs)}
        return np.array([order[int(epoch)][place] for epoch, place in zip(epochs, places, strict=True)])

    def _epoch(self, epoch: int) -> np.ndarray:
        return _epoch_order(self.block.tobytes(), self.block_bytes.tobytes(), self.seed, epoch, self.window_bytes)


@lru_cache(maxsize=4)
def _epoch_order(block_of: bytes, block_bytes: bytes, seed: int, epoch: int, window_bytes: int) -> np.ndarray:
    """The permutation of the rows in one epoch, [n] int64."""
    block, sizes = np.frombuffer(block_of, np.int64), np.frombuffer(block_bytes, np.int64)
    random = np.random.default_rng([seed, epoch])
    used = np.unique(block)
    random.shuffle(used)
    window = np.zeros(len(sizes), np.int64)
    filled, number = 0, 0
    for name in used:
        if filled and filled + sizes[name] > window_bytes:
            filled, number = 0, number + 1
        window[name] = number
        filled += int(sizes[name])
    # Sorted by window, then by a random key: one sort shuffles all windows.
    order: np.ndarray = np.lexsort((random.permutation(len(block)), window[block]))
    return order


def share_of(rows: np.ndarray, lengths: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The rows of one step that rank `rank` of `world_size` takes, so that all ranks have about as many tokens.

    Rows are dealt out longest first, to the ranks in ascending order, then in descending order, and so on.
    """
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    turn = np.arange(len(ordered)) % (2 * world_size)
    dealt = np.where(turn < world_size, turn, 2 * world_size - 1 - turn)
    share: np.ndarray = ordered[dealt == rank]
    return share
