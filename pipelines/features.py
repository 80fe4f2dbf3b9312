"""Reading distilled rows back: token ids in memory, hidden states a row group at a time, order a pure function.

    shard 0   [row group 0][row group 1] ...       a block = one row group of one shard
    epoch     blocks shuffled, grouped into windows of bounded size, rows shuffled inside a window

A window that holds everything is a full shuffle; a larger set is shuffled in pieces that fit the block cache, so memory
does not grow with the data. The order depends on (seed, position) alone: a trainer resumes from its step number.
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
from torch import Tensor

from hydra_core.errors import InputError
from hydra_core.training.packing import FeatureRow
from pipelines.contracts import FEATURES, check_schema

CACHE_BYTES = 512 << 20
_DTYPES = {"bf16": (torch.bfloat16, 2), "fp32": (torch.float32, 4)}
_PLAIN = ("id", "split", "base", "temperature", "hidden_dtype", "hidden_tokens", "hidden_width", "hidden_layer")
_LIGHT = (*_PLAIN, "prompt_ids", "response_ids")


@dataclass(frozen=True)
class Block:
    """One row group of one shard; the unit of reading."""

    path: Path
    group: int
    bytes: int


@dataclass(frozen=True)
class RowIndex:
    """Everything but hidden states of n rows: ids; tokens [sum] int32 with offsets [n + 1] int64; prompt_tokens [n];
    temperature [n] float64; block [n] int64 and place [n] int64 (row inside its block).
    """

    ids: tuple[str, ...]
    tokens: np.ndarray
    offsets: np.ndarray
    prompt_tokens: np.ndarray
    temperature: np.ndarray
    block: np.ndarray
    place: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class FeatureStore:
    """Rows of one split of a features folder.

    `base`: identity of the base that made them; `width`: D; `dtype`: of the stored hidden states. Not thread safe.
    """

    def __init__(self, blocks: Sequence[Block], index: RowIndex, base: str, width: int, dtype: str,
                 cache_bytes: int) -> None:
        self.blocks, self.index, self.base, self.width, self.dtype = tuple(blocks), index, base, width, dtype
        self._budget = cache_bytes
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._held = 0

    @classmethod
    def open(cls, folder: Path, split: str, *, cache_bytes: int = CACHE_BYTES) -> FeatureStore:
        """Index the shards `folder/*.parquet`.

        `cache_bytes` bounds the hidden states kept in memory. Raises InputError for an empty folder, a file that is not
        a feature shard, rows of different bases, or a split without rows.
        """
        paths = sorted(folder.glob("*.parquet"))
        if not paths:
            raise InputError(f"{folder}: has no feature shards (*.parquet): run `hydra-heads distill` first")
        reader = _IndexReader(split)
        for path in paths:
            reader.add(path)
        return reader.build(folder, cache_bytes)

    def __len__(self) -> int:
        return len(self.index.ids)

    def token_ids(self, row: int) -> np.ndarray:
        """Prompt and response of a row, [T] int32, a view."""
        return self.index.tokens[self.index.offsets[row]:self.index.offsets[row + 1]]

    def read(self, row: int) -> FeatureRow:
        """One row with its hidden states. Raises InputError that names the row if their size is not what it says."""
        index, tokens = self.index, self.token_ids(row)
        values = self._hidden(int(index.block[row]))[int(index.place[row])].as_buffer()
        dtype, size = _DTYPES[self.dtype]
        if len(values) != len(tokens) * self.width * size:
            block = self.blocks[int(index.block[row])]
            raise InputError(f"{block.path}: row {index.ids[row]}: hidden holds {len(values)} bytes, not "
                             f"{len(tokens)} x {self.width} x {size}: distill again")
        hidden = torch.frombuffer(bytearray(values), dtype=dtype).view(len(tokens), self.width)
        return FeatureRow(torch.from_numpy(tokens.astype(np.int64)), int(index.prompt_tokens[row]), hidden)

    def sample(self, rows: int, seed: int) -> np.ndarray:
        """At most `rows` row numbers of a seeded shuffle, greedy rows alone where there are any.

        A sampled answer is not what a greedy decoder meets; drafters rank by the draw's own noise there.
        """
        greedy = np.flatnonzero(self.index.temperature == 0)
        among = greedy if len(greedy) else np.arange(len(self))
        return np.random.default_rng([seed, 1]).permutation(among)[:rows]

    def response_counts(self, vocab_size: int) -> Tensor:
        """How often each token was answered: [V] int64. Raises InputError for an id outside the vocabulary."""
        index = self.index
        within = np.arange(len(index.tokens)) - np.repeat(index.offsets[:-1], index.lengths)
        answered = index.tokens[within >= np.repeat(index.prompt_tokens, index.lengths)]
        if len(answered) and (answered.max() >= vocab_size or answered.min() < 0):
            raise InputError(f"features: a token id ({int(answered.max())}) is outside the base's vocabulary of "
                             f"{vocab_size}: use the base that made them or distill again")
        return torch.from_numpy(np.bincount(answered, minlength=vocab_size).astype(np.int64))

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
        return column


class _IndexReader:
    """Collects the light columns of shards, row group by row group."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.blocks: list[Block] = []
        self.ids: list[str] = []
        self.tokens: list[np.ndarray] = []
        self.prompt_tokens: list[int] = []
        self.temperature: list[float] = []
        self.block: list[int] = []
        self.place: list[int] = []
        self.kinds: set[tuple[str, int, str]] = set()

    def add(self, path: Path) -> None:
        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException):
            raise InputError(f"{path}: is not a readable Parquet file: delete it and distill again") from None
        with file:
            check_schema(file.schema_arrow, FEATURES, str(path))
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                light = file.read_row_group(group, columns=list(_LIGHT))
                self.blocks.append(Block(path, group, meta.total_byte_size))
                self._add_rows(path, light)

    def _add_rows(self, path: Path, light: pa.Table) -> None:
        columns = {name: light.column(name).to_pylist() for name in _PLAIN}
        for place in range(light.num_rows):
            if columns["split"][place] != self.split:
                continue
            name = columns["id"][place]
            prompt = light.column("prompt_ids")[place].values.to_numpy()
            response = light.column("response_ids")[place].values.to_numpy()
            if columns["hidden_tokens"][place] != len(prompt) + len(response) or not len(prompt):
                raise InputError(f"{path}: row {name}: hidden_tokens {columns['hidden_tokens'][place]} is not "
                                 f"{len(prompt)} prompt + {len(response)} response tokens")
            if columns["hidden_layer"][place] != "last" or columns["hidden_dtype"][place] not in _DTYPES:
                raise InputError(f"{path}: row {name}: hidden_layer {columns['hidden_layer'][place]!r} / hidden_dtype "
                                 f"{columns['hidden_dtype'][place]!r} cannot be trained on")
            self.kinds.add((columns["base"][place], columns["hidden_width"][place], columns["hidden_dtype"][place]))
            if len(self.kinds) > 1:
                raise InputError(f"{path}: row {name}: rows of different bases or formats stand in one folder")
            self.ids.append(name)
            self.tokens.append(np.concatenate([prompt, response]))
            self.prompt_tokens.append(len(prompt))
            self.temperature.append(columns["temperature"][place])
            self.block.append(len(self.blocks) - 1)
            self.place.append(place)

    def build(self, folder: Path, cache_bytes: int) -> FeatureStore:
        if not self.ids:
            raise InputError(f"{folder}: has no rows of the split {self.split!r}: distill more prompts")
        (kind,) = self.kinds
        offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in self.tokens])]).astype(np.int64)
        index = RowIndex(
            tuple(self.ids), np.concatenate(self.tokens).astype(np.int32), offsets, np.array(self.prompt_tokens),
            np.array(self.temperature), np.array(self.block), np.array(self.place))
        return FeatureStore(self.blocks, index, *kind, cache_bytes)


@dataclass(frozen=True)
class BatchOrder:
    """Which rows make up each step: `block` [n] int64 of each row, `block_bytes` [blocks] int64."""

    block: np.ndarray
    block_bytes: np.ndarray
    rows_per_step: int
    seed: int
    window_bytes: int = CACHE_BYTES

    @classmethod
    def of(cls, store: FeatureStore, rows_per_step: int, seed: int) -> BatchOrder:
        return cls(store.index.block, np.array([block.bytes for block in store.blocks]), rows_per_step, seed)

    def total_steps(self, epochs: float) -> int:
        """Steps that show every row at least `epochs` times."""
        return max(1, int(np.ceil(round(epochs * len(self.block) / self.rows_per_step, 9))))

    def rows(self, step: int) -> np.ndarray:
        """[rows_per_step] int64 row numbers of step `step`: stretches of one epoch after the other."""
        at = step * self.rows_per_step + np.arange(self.rows_per_step)
        epochs, places = at // len(self.block), at % len(self.block)
        return np.array([self._epoch(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])

    def _epoch(self, epoch: int) -> np.ndarray:
        return _epoch_order(self.block.tobytes(), self.block_bytes.tobytes(), self.seed, epoch, self.window_bytes)


@lru_cache(maxsize=4)
def _epoch_order(block_of: bytes, block_bytes: bytes, seed: int, epoch: int, window_bytes: int) -> np.ndarray:
    """A permutation of the rows for one epoch."""
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
    # A random key inside the window and the window first: one sort shuffles all windows.
    order: np.ndarray = np.lexsort((random.permutation(len(block)), window[block]))
    return order


def share_of(rows: np.ndarray, lengths: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The rows rank `rank` of `world` takes of one step, about equally many tokens each.

    They are dealt longest first, to and fro.
    """
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    turn = np.arange(len(ordered)) % (2 * world)
    dealt = np.where(turn < world, turn, 2 * world - 1 - turn)
    share: np.ndarray = ordered[dealt == rank]
    return share
