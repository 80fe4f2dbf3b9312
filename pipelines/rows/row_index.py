"""An index of rows without their hidden states: lengths in memory, token ids in a mapped temporary file.

A row takes about 200 bytes of memory, whatever its length: a thousandth of its hidden states. Token ids are written to an
unnamed temporary file and mapped from it, so that the operating system may drop and reread pages when it needs memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from hydra_core.errors import InputError
from hydra_core.storage import opened
from hydra_core.training.packing import FeatureRow
from pipelines.rows.schemas import FEATURES, check_schema, is_in_share

HIDDEN_BYTES = {"bf16": 2, "fp32": 4}
_PLAIN = ("id", "split", "base", "temperature")
_HIDDEN = ("hidden_dtype", "hidden_tokens", "hidden_width", "hidden_layer")


@dataclass(frozen=True)
class Block:
    """One row group of one shard: the unit of reading."""

    path: Path
    group: int
    bytes: int


@dataclass(frozen=True)
class RowIndex:
    """All columns of n rows except hidden states.

    `ids`: n texts; `tokens`: [sum] int32, prompt and response of each row; `offsets`: [n + 1] int64 into it; `prompt_tokens`:
    [n] int64; `temperature`: [n] float64; `block`: [n] int64; `place`: [n] int64, the row inside its block.
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


class RowStore:
    """Rows of one split, by number. `base`: identity of the base that made them. Subclasses provide the hidden states.

    `reads_blocks`: whether a row costs the reading of its whole block.
    """

    reads_blocks = False

    def __init__(self, blocks: Sequence[Block], index: RowIndex, base: str) -> None:
        self.blocks, self.index, self.base = tuple(blocks), index, base

    def __len__(self) -> int:
        return len(self.index.ids)

    def token_ids(self, row: int) -> np.ndarray:
        """Prompt and response of a row, [T] int32, a view."""
        return self.index.tokens[self.index.offsets[row]:self.index.offsets[row + 1]]

    def read_rows(self, rows: Sequence[int]) -> list[FeatureRow]:
        """Rows with their hidden states, in that order."""
        raise NotImplementedError

    def sample(self, rows: int, seed: int) -> np.ndarray:
        """At most `rows` row numbers of a seeded shuffle; greedy rows only, if there are any.

        A greedy decoder does not produce sampled answers, and on them the noise of sampling would decide between drafters.
        """
        greedy = np.flatnonzero(self.index.temperature == 0)
        among = greedy if len(greedy) else np.arange(len(self))
        return np.random.default_rng([seed, 1]).permutation(among)[:rows]

    def response_counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs in the answers: [V] int64. Raises InputError for an id outside the vocabulary."""
        counts = np.zeros(vocab_size, np.int64)
        for row, prompt in enumerate(self.index.prompt_tokens):
            answered = self.token_ids(row)[prompt:]
            if len(answered) and (answered.max() >= vocab_size or answered.min() < 0):
                raise InputError(f"features: a token id ({int(answered.max())}) is outside the base's vocabulary of "
                                 f"{vocab_size}: use the base that made them or distill again")
            np.add.at(counts, answered, 1)
        return torch.from_numpy(counts)


def disk_array(file: IO[bytes], dtype: Any, count: int) -> np.ndarray:
    """Map `count` values of an open file: [count] of `dtype`, writable."""
    return np.memmap(file, dtype=dtype, mode="r+", shape=(count,))  # type: ignore[no-any-return, call-overload]


class IndexReader:
    """Reads the small columns of shards, row group by row group.

    `share`: share of the split's rows that is taken, which the ids alone decide; `kinds`: (base, width, dtype) of the rows, the
    last two None where `contract` has no hidden states.
    """

    def __init__(self, split: str, contract: pa.Schema, share: float = 1.0) -> None:
        self.split, self.contract, self.share = split, contract, share
        self.columns = (*_PLAIN, *_HIDDEN) if contract == FEATURES else _PLAIN
        self.blocks: list[Block] = []
        self.ids: list[str] = []
        self.lengths: list[int] = []
        self.prompt_tokens: list[int] = []
        self.temperature: list[float] = []
        self.block: list[int] = []
        self.place: list[int] = []
        self.kinds: set[tuple[str, Any, Any]] = set()
        self._known: set[str] = set()
        self._tokens = tempfile.TemporaryFile()  # the index maps it, and closes it with the mapping  # noqa: SIM115

    def add_folders(self, folders: Sequence[Path], what: str) -> None:
        """Read all shards of the folders, in order. Raises InputError as `add`, and for a folder without shards, of `what`."""
        for folder in folders:
            paths = sorted(folder.glob("*.parquet"))
            if not paths:
                raise InputError(f"{folder}: has no {what} (*.parquet): run `hydra-heads distill` first")
            for path in paths:
                self.add(path)

    def add(self, path: Path) -> None:
        """Read one shard. Raises InputError for a file that is not a shard, or a row that cannot be trained on."""
        try:
            file = pq.ParquetFile(opened(path))
        except (OSError, pa.ArrowException):
            raise InputError(f"{path}: is not a readable Parquet file: delete it and distill again") from None
        with file:
            check_schema(file.schema_arrow, self.contract, str(path))
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                light = file.read_row_group(group, columns=[*self.columns, "prompt_ids", "response_ids"])
                self.blocks.append(Block(path, group, meta.total_byte_size))
                self._add_rows(path, light)

    def _add_rows(self, path: Path, light: pa.Table) -> None:
        columns = {name: light.column(name).to_pylist() for name in self.columns}
        for place in range(light.num_rows):
            if columns["split"][place] != self.split or not is_in_share(columns["id"][place], self.share):
                continue
            if columns["id"][place] in self._known:  # a row of two runs
                continue
            self._known.add(columns["id"][place])
            row = {name: values[place] for name, values in columns.items()}
            prompt = light.column("prompt_ids")[place].values.to_numpy()
            response = light.column("response_ids")[place].values.to_numpy()
            self._check(path, row, len(prompt), len(response))
            tokens = np.concatenate([prompt, response]).astype(np.int32)
            self._tokens.write(tokens.tobytes())
            self.ids.append(row["id"])
            self.lengths.append(len(tokens))
            self.prompt_tokens.append(len(prompt))
            self.temperature.append(row["temperature"])
            self.block.append(len(self.blocks) - 1)
            self.place.append(place)

    def _check(self, path: Path, row: dict[str, Any], prompt: int, response: int) -> None:
        if row.get("hidden_tokens", prompt + response) != prompt + response or not prompt:
            raise InputError(f"{path}: row {row['id']}: hidden_tokens {row.get('hidden_tokens')} is not "
                             f"{prompt} prompt + {response} response tokens")
        if row.get("hidden_layer", "last") != "last" or row.get("hidden_dtype", "bf16") not in HIDDEN_BYTES:
            raise InputError(f"{path}: row {row['id']}: hidden_layer {row['hidden_layer']!r} / hidden_dtype "
                             f"{row['hidden_dtype']!r} cannot be trained on")
        self.kinds.add((row["base"], row.get("hidden_width"), row.get("hidden_dtype")))
        if len(self.kinds) > 1:
            raise InputError(f"{path}: row {row['id']}: one folder holds rows of different bases or formats")

    def build(self, folder: Path) -> RowIndex:
        """The index of all rows. Raises InputError if there are none."""
        if not self.ids:
            raise InputError(f"{folder}: has no rows of the split {self.split!r}: distill more prompts, and with "
                             "distill.features=all unless train.features=online")
        self._tokens.flush()
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        return RowIndex(
            tuple(self.ids), disk_array(self._tokens, np.int32, int(offsets[-1])), offsets, np.array(self.prompt_tokens),
            np.array(self.temperature), np.array(self.block), np.array(self.place))
