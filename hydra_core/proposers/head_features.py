"""Hidden states that the prefix layer has not read yet: a step that drafts without heads leaves its own for later."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_core.base.kv_cache import KVCache
from hydra_core.base.model import PREFILL_CHUNK
from hydra_core.heads import HeadDrafter
from hydra_core.heads.hydra_plus import HydraPlusPlus
from hydra_core.tree.batch import chain

ROOM = 64
"""Hidden states of a row that may be pending; longer input is read at once."""


def feature_bytes(drafter: HeadDrafter, rows: int, slots: int) -> int:
    """Bytes that `HeadFeatures` keeps for `rows` rows and `slots` slots of the base's KV cache."""
    prefix = drafter.prefix if isinstance(drafter, HydraPlusPlus) else None
    states = 1 + (ROOM if prefix else 0)
    kept = rows * states * drafter.weight.shape[0] * drafter.weight.element_size()
    return kept + (prefix.cache_bytes(rows, slots + ROOM) if prefix else 0)


def kept_feature_bytes(drafter: HeadDrafter, tokens: int) -> int:
    """Bytes of the keys and values of `HeadFeatures` of `tokens` tokens."""
    return drafter.prefix.cache_bytes(1, tokens) if isinstance(drafter, HydraPlusPlus) else 0


class HeadFeatures:
    """What heads read at each row's last committed position: `features` [R, D], up to date after `catch_up`.

    The cache of the prefix layer always covers a row's committed tokens except the pending ones. `rows`, `slots`: of the
    base's KV cache; `recorded`: only rows that decode may have pending hidden states, see `RecordedDrafts`.
    """

    def __init__(self, drafter: HeadDrafter, rows: int, slots: int, recorded: bool = False) -> None:
        weight = drafter.weight
        self.features = torch.zeros(rows, weight.shape[0], dtype=weight.dtype, device=weight.device)
        self.prefix = drafter.prefix if isinstance(drafter, HydraPlusPlus) else None
        self.cache: KVCache | None = self.prefix.allocate(rows, slots + ROOM) if self.prefix else None
        self.pending = torch.zeros(rows, ROOM if self.prefix else 0, weight.shape[0], dtype=weight.dtype, device=weight.device)
        self.counts = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.most_pending = 0  # an upper bound of `counts` that the host knows without a question to the GPU
        self.recorded = recorded

    @property
    def kv_caches(self) -> tuple[KVCache, ...]:
        """That of the prefix layer, where there is one; complete after `catch_up`."""
        return (self.cache,) if self.cache is not None else ()

    def clear(self, row: int) -> None:
        """A new sequence takes `row`."""
        self.counts[row] = 0
        if self.cache is not None:
            self.cache.clear_rows((row, row + 1))

    def commit(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        """Take newly committed hidden states [B, M, D], the first `counts` [B] of each row; M may be 0."""
        hidden = hidden.to(self.features.dtype)
        width = hidden.shape[1]
        if width == 0:
            return
        if self.prefix is None:
            self._keep_last(rows, hidden, counts)
        elif self.most_pending + width <= ROOM and not (self.recorded and rows[0]):
            index = self.counts[rows[0]:rows[1], None] + torch.arange(width, device=hidden.device)
            self.pending[rows[0]:rows[1]].scatter_(1, index[..., None].expand_as(hidden), hidden)
            self.counts[rows[0]:rows[1]] += counts
            on_host = hidden.device.type == "cpu"
            self.most_pending = int(self.counts.max()) if on_host else self.most_pending + width
        else:
            self.catch_up()
            for start in range(0, width, PREFILL_CHUNK):
                piece = hidden[:, start:start + PREFILL_CHUNK]
                self._read(rows, piece, (counts - start).clamp(0, piece.shape[1]))

    def catch_up(self) -> None:
        """Read the pending hidden states of all rows in one call."""
        if self.most_pending == 0 or self.prefix is None:
            return
        longest = int(self.counts.max())
        if longest:
            rows = int(self.counts.nonzero().max()) + 1
            self._read((0, rows), self.pending[:rows, :longest], self.counts[:rows].clone())
            self.counts.zero_()
        self.most_pending = 0

    def read_pending(self, rows: int, width: int, kv_len: int) -> None:
        """Read up to `width` pending hidden states of each of the first `rows` rows; only the device knows how many there are.

        `kv_len`: slots that attention reads, as `KVCache.build_metadata` takes it.
        """
        counts = self.counts[:rows]
        self._read((0, rows), self.pending[:rows, :width], counts, kv_len)
        counts.zero_()

    def _read(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor, kv_len: int | None = None) -> None:
        assert self.prefix is not None and self.cache is not None
        step = self.cache.build_metadata(rows, chain(hidden.shape[1]), kv_len)
        hidden = self.prefix.step(hidden, self.cache, step, counts)
        self.cache.lengths[rows[0]:rows[1]] += counts
        self._keep_last(rows, hidden, counts)

    def _keep_last(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        batch = torch.arange(len(counts), device=hidden.device)
        last = hidden[batch, (counts - 1).clamp(min=0)]
        kept = self.features[rows[0]:rows[1]]
        self.features[rows[0]:rows[1]] = torch.where((counts > 0)[:, None], last, kept)

    def move(self, source: int, target: int) -> None:
        """The sequence of row `source` continues in row `target`."""
        self.features[target] = self.features[source]
        if self.cache is not None:
            self.cache.move_row(source, target)
            self.pending[target], self.counts[target] = self.pending[source], self.counts[source]
            self.counts[source] = 0

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Row `target` begins with the first `count` tokens of row `source`."""
        if self.cache is not None:
            self.catch_up()
            self.cache.copy_prefix(source, target, count)
