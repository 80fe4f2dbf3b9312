"""Models whose cache is not made of keys and values (recurrent, hybrid): rows run one by one, without drafts or padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hydra_core.base.kv_cache import AttentionMetadata
from hydra_core.base.probe import decoder_of
from hydra_core.base.taps import with_taps
from hydra_core.tree.batch import TreeBatch


class SequentialCache:
    """A transformers cache for each row, behind the methods of a `KVCache` that the engine calls."""

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        self.states: list[Any] = [None] * rows
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rows, self.slots = rows, slots

    def build_metadata(self, rows: tuple[int, int], trees: TreeBatch, written: int = 0) -> AttentionMetadata:
        """As `KVCache.build_metadata`, for chains only. Raises ValueError for a tree that branches."""
        if trees.depth != trees.size - 1 or written:
            raise ValueError("a recurrent state cannot hold a tree")
        lengths = self.lengths[rows[0]:rows[1]]
        positions = lengths[:, None] + torch.arange(trees.size, device=lengths.device)
        return AttentionMetadata(rows, positions, positions, int(lengths.max()) + trees.size, None)

    def commit(self, rows: tuple[int, int], path: Tensor, counts: Tensor) -> None:
        """Only the lengths grow: the state already contains the root."""
        assert path.shape[1] == 1
        self.lengths[rows[0]:rows[1]] += counts

    def move_row(self, source: int, target: int) -> None:
        self.states[target], self.states[source] = self.states[source], None
        self.lengths[target] = self.lengths[source]

    def clear_rows(self, rows: tuple[int, int]) -> None:
        self.states[rows[0]:rows[1]] = [None] * (rows[1] - rows[0])
        self.lengths[rows[0]:rows[1]] = 0


class SequentialDecoder:
    """The transformers model, with a separate cache for every row."""

    supports_tree = False
    ragged = False

    def __init__(self, model: Any) -> None:
        self.model = decoder_of(model)
        self.embedding = model.get_input_embeddings().weight.detach()
        names = inspect.signature(self.model.forward).parameters
        known = ("cache", "cache_params", "past_key_values")  # argument and output field have one of these names
        self.argument = next((name for name in known if name in names), known[-1])

    def allocate(self, rows: int, slots: int) -> SequentialCache:
        return SequentialCache(rows, slots, self.embedding.device)

    def cache_bytes(self, rows: int, slots: int) -> int:
        """0: transformers allocates while it runs, so the size is not known beforehand."""
        return 0

    def __call__(self, ids: Tensor, cache: SequentialCache, metadata: AttentionMetadata, counts: Tensor | None = None,
                 taps: Sequence[int] = ()) -> Tensor:
        """As `Decoder.__call__`. The first call for a row takes its whole prompt, each later call one token."""
        batch, width = ids.shape
        real = [width] * batch if counts is None else counts.tolist()
        hidden: Tensor = self.embedding.new_zeros(batch, width, (1 + len(taps)) * self.embedding.shape[1])
        for offset, count in enumerate(real):
            row = metadata.rows[0] + offset
            if count:
                given = {self.argument: cache.states[row]} if cache.states[row] is not None else {}
                output = self.model(input_ids=ids[offset:offset + 1, :count], use_cache=True, output_hidden_states=bool(taps),
                                    **given)
                cache.states[row] = getattr(output, self.argument)
                hidden[offset, :count] = with_taps(output.last_hidden_state, [output.hidden_states[tap] for tap in taps])[0]
        return hidden
