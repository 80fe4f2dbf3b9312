"""Hidden states that are computed while training: the base runs in the trainer, and the disk holds token ids only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hydra_core.base import Base
from hydra_core.training.packing import FeatureRow
from pipelines.rows.row_index import IndexReader, RowStore
from pipelines.rows.schemas import RESPONSES

FORWARD_TOKENS = 4096  # padded tokens in one forward of the base


class OnlineStore(RowStore):
    """Answers of one split. Call `use` with a base before `read_rows`; the driver, which only counts rows, needs no base."""

    _model: Base | None = None
    _taps: tuple[int, ...] = ()

    @classmethod
    def open(cls, folder: Path, split: str, share: float = 1.0, also: Sequence[Path] = ()) -> OnlineStore:
        """Index the answers `folder/*.parquet`, and those of the folders `also`. Raises InputError as `FeatureStore.open`."""
        reader = IndexReader(split, RESPONSES, share)
        reader.add_folders((folder, *also), "answers")
        index = reader.build(folder)
        ((base, _, _),) = reader.kinds
        return cls(reader.blocks, index, base)

    def use(self, base: Base, taps: Sequence[int] = ()) -> None:
        """Set the base that computes the hidden states, and the layers whose inputs are wanted behind them."""
        self._model, self._taps = base, tuple(taps)

    def read_rows(self, rows: Sequence[int]) -> list[FeatureRow]:
        """Rows with hidden states in the base's own dtype; one forward takes as many rows as fit `FORWARD_TOKENS`."""
        assert self._model is not None
        found: dict[int, FeatureRow] = {}
        group: list[int] = []
        for row in sorted(rows, key=lambda row: len(self.token_ids(row))):
            if group and len(self.token_ids(row)) * (len(group) + 1) > FORWARD_TOKENS:
                found |= self._forward(self._model, group)
                group = []
            group.append(row)
        found |= self._forward(self._model, group)
        return [found[row] for row in rows]

    def _forward(self, base: Base, rows: Sequence[int]) -> dict[int, FeatureRow]:
        sequences = [self.token_ids(row).tolist() for row in rows]
        hidden = base.hidden_states(sequences, self._taps)
        return {row: FeatureRow(torch.tensor(ids), int(self.index.prompt_tokens[row]), states)
                for row, ids, states in zip(rows, sequences, hidden, strict=True)}
