"""Reading distilled rows: an index in memory, hidden states by row group.

    shard 0   [row group 0][row group 1] ...       a block = one row group of one shard

Blocks that were read are kept within a budget, so that memory does not grow with the data. `batch_order` takes the rows of
each step from as few blocks at a time as fit it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hydra_core.errors import InputError
from hydra_core.storage import is_remote, opened
from hydra_core.training.packing import FeatureRow
from pipelines.rows.row_index import HIDDEN_BYTES, Block, IndexReader, RowIndex, RowStore
from pipelines.rows.schemas import FEATURES

CACHE_BYTES = 512 << 20
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class FeatureStore(RowStore):
    """Rows of one split of a features folder. `width`: D; `dtype`: of the stored hidden states. Not thread safe."""

    reads_blocks = True

    def __init__(self, blocks: Sequence[Block], index: RowIndex, base: str, width: int, dtype: str,
                 cache_bytes: int) -> None:
        super().__init__(blocks, index, base)
        self.width, self.dtype = width, dtype
        self._budget = cache_bytes
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()  # the next one to drop first
        self._held = 0
        self._rows = np.bincount(index.block, minlength=len(self.blocks))
        self._left = self._rows.copy()  # rows of each block that were not read since it was

    @classmethod
    def open(cls, folder: Path, split: str, *, cache_bytes: int = CACHE_BYTES, share: float = 1.0,
             also: Sequence[Path] = ()) -> FeatureStore:
        """Index the shards `folder/*.parquet`, and those of the folders `also`, of whose rows with one id the first counts.

        `cache_bytes`: limit of the hidden states in memory; `share`: share of the split's rows that is taken. Raises InputError
        for an empty folder, a file that is not a feature shard, rows of different bases, or a split without rows.
        """
        reader = IndexReader(split, FEATURES, share)
        reader.add_folders((folder, *also), "feature shards")
        index = reader.build(folder)
        (kind,) = reader.kinds
        return cls(reader.blocks, index, *kind, cache_bytes)

    def read(self, row: int) -> FeatureRow:
        """One row with its hidden states. Raises InputError, which names the row, if their size does not match its columns."""
        index, tokens = self.index, self.token_ids(row)
        number = int(index.block[row])
        values = self._hidden(number)[int(index.place[row])].as_buffer()
        self._left[number] -= 1
        if not self._left[number]:  # in an epoch none of its rows comes again: the next block takes its room
            self._left[number] = self._rows[number]
            self._cache.move_to_end(number, last=False)
        dtype, size = _DTYPES[self.dtype], HIDDEN_BYTES[self.dtype]
        if len(values) != len(tokens) * self.width * size:
            block = self.blocks[number]
            raise InputError(f"{block.path}: row {index.ids[row]}: hidden holds {len(values)} bytes, not "
                             f"{len(tokens)} x {self.width} x {size}: distill again")
        hidden = torch.frombuffer(bytearray(values), dtype=dtype).view(len(tokens), self.width)
        return FeatureRow(torch.from_numpy(tokens.astype(np.int64)), int(index.prompt_tokens[row]), hidden)

    def read_rows(self, rows: Sequence[int]) -> list[FeatureRow]:
        """Rows in that order. Those in memory are read first: a block that is loaded may drop theirs."""
        block = self.index.block[list(rows)]
        order = sorted(range(len(rows)), key=lambda at: (int(block[at]) not in self._cache, int(block[at])))
        found = {at: self.read(rows[at]) for at in order}
        return [found[at] for at in range(len(rows))]

    def _hidden(self, block: int) -> pa.ChunkedArray:
        if block in self._cache:
            self._cache.move_to_end(block)
            return self._cache[block]
        where = self.blocks[block]
        with pq.ParquetFile(opened(where.path), memory_map=not is_remote(where.path)) as file:
            column = file.read_row_group(where.group, columns=["hidden"]).column("hidden")
        while self._cache and self._held + column.nbytes > self._budget:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        self._cache[block], self._left[block] = column, self._rows[block]
        self._held += column.nbytes
        pa.default_memory_pool().release_unused()  # Arrow would keep the memory of earlier reads beside the cache
        return column
