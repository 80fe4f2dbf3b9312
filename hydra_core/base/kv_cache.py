"""A preallocated key/value cache with a length of its own for every row.

Letters: L layers, R rows the cache can hold, B rows in this step, N tokens (tree nodes) a row in this step, S slots a row,
H key/value heads, d head width. A row's slots 0..n-1 hold committed tokens, a step writes its N nodes to n..n+N-1, and
`commit` moves the accepted ones together. Slots at and past a row's length are never visible, so nothing is cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.tree.batch import TreeBatch


@dataclass(frozen=True)
class Step:
    """Where one forward of B rows x N nodes reads and writes.

    `rows`: the cache rows [start, stop); `positions`: [B, N] int64; `slots`: [B, N] int64; `span`: slots that attention
    reads; `mask`: additive [B, 1, N, span] in the cache's dtype, or None when every node sees the whole span; `fixed`:
    the span was given and may be longer than the rows need, so that where nodes go is known to the device alone.
    """

    rows: tuple[int, int]
    positions: Tensor
    slots: Tensor
    span: int
    mask: Tensor | None
    fixed: bool = False

    def windowed(self, window: int) -> Tensor:
        """The mask of a layer that looks back `window` positions, its own included: additive [B, 1, N, span] float32."""
        batch = self.slots.shape[0]
        keys = torch.arange(self.span, device=self.slots.device).expand(batch, -1).scatter(1, self.slots, self.positions)
        far = keys[:, None, None, :] <= self.positions[:, None, :, None] - window
        seen = torch.zeros(far.shape, device=far.device) if self.mask is None else self.mask.float()
        return seen.masked_fill(far, float("-inf"))


def real_nodes(counts: Tensor | None, nodes: int) -> Tensor | None:
    """Which of B rows' nodes are among the first `counts` [B] of each: [B, nodes] bool on the host, None where all are."""
    if counts is None or int(counts.min()) == nodes:
        return None
    return torch.arange(nodes) < counts[:, None]


MASKED_APART = 8
"""Rows whose masks are made one at a time: up to so many take less than a dozen operations on all."""
MOVED_APART = 12
"""Slots that are moved one at a time: up to so many take less than one indexing of them all."""


class KVCache:
    """Keys and values of R rows x S slots for L layers, allocated once."""

    def __init__(self, layers: int, rows: int, slots: int, heads: int, width: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> None:
        self.keys = torch.zeros(layers, rows, slots, heads, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rows, self.slots = rows, slots
        self.waits = self.keys.device.type != "cpu"  # to ask the device a question is to wait for all that it has to do
        self._slot_range = torch.arange(slots, device=device)

    @staticmethod
    def bytes_for(layers: int, rows: int, slots: int, heads: int, width: int, dtype: torch.dtype) -> int:
        """What such a cache takes."""
        return 2 * layers * rows * slots * heads * width * dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def plan(self, rows: tuple[int, int], forest: TreeBatch, span: int | None = None) -> Step:
        """Positions, slots and mask of a forward over `forest` on top of what `rows` hold.

        `span`: slots that attention reads, where the caller knows that they hold every row he cares for. Nothing is then
        asked of the device, and a row without room for the nodes writes them to its last slots.
        Raises ValueError when no span is given and a row has no room for the nodes.
        """
        lengths, nodes, fixed = self.lengths[rows[0]:rows[1]], forest.size, span is not None
        forest = forest.to(lengths.device)
        if span is None:
            longest = int(lengths.max())
            if longest + nodes > self.slots:
                raise ValueError(f"{nodes} nodes on top of {longest} tokens do not fit {self.slots} slots")
            span = longest + nodes
        else:
            lengths = lengths.clamp(max=self.slots - nodes)
        positions = lengths[:, None] + forest.depths
        slots = lengths[:, None] + self._slot_range[:nodes]
        if nodes == 1 and len(lengths) == 1 and not fixed:
            return Step(rows, positions, slots, span, None)
        apart = not (fixed or self.waits) and len(lengths) <= MASKED_APART
        mask = self._mask_apart(lengths.tolist(), forest, span) if apart else self._mask(lengths, forest, span)
        return Step(rows, positions, slots, span, mask, fixed)

    def _mask(self, lengths: Tensor, forest: TreeBatch, span: int) -> Tensor:
        """A node sees its row's committed slots and its ancestors: additive [B, 1, N, span]."""
        nodes = forest.size
        offset = self._slot_range[:span] - lengths[:, None]                     # [B, span], node index of a slot
        inside = (offset >= 0) & (offset < nodes)
        index = offset.clamp(0, nodes - 1)[:, None].expand(-1, nodes, -1)       # [B, N, span]
        seen = forest.ancestors.expand(len(lengths), -1, -1).gather(2, index) & inside[:, None]
        seen |= (offset < 0)[:, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=lengths.device)
        return mask.masked_fill_(~seen, float("-inf"))[:, None]

    def _mask_apart(self, lengths: Sequence[int], forest: TreeBatch, span: int) -> Tensor:
        """The same, row by row: what is hidden is a corner of it."""
        mask = torch.zeros(len(lengths), 1, forest.size, span, dtype=self.dtype)
        hidden = ~forest.ancestors
        for row, length in enumerate(lengths):
            end = min(length + forest.size, span)
            own = hidden[row if len(hidden) > 1 else 0, :, :end - length]
            mask[row, 0, :, length:end].masked_fill_(own, float("-inf"))
            if end < span:
                mask[row, 0, :, end:] = float("-inf")
        return mask

    def write(self, layer: int, step: Step, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, N, H, d] keys and values; return views [B, H, span, d] of all that attention may read."""
        start, stop = step.rows
        stored_keys, stored_values = self.keys[layer, start:stop], self.values[layer, start:stop]
        if stop - start == 1 and not step.fixed:
            nodes = keys.shape[1]
            first = step.span - nodes
            stored_keys[:, first:step.span] = keys
            stored_values[:, first:step.span] = values
        else:
            batch = torch.arange(stop - start, device=keys.device)[:, None]
            stored_keys[batch, step.slots] = keys
            stored_values[batch, step.slots] = values
        return stored_keys[:, :step.span].transpose(1, 2), stored_values[:, :step.span].transpose(1, 2)

    def commit(self, rows: tuple[int, int], path: Tensor, counts: Tensor) -> None:
        """Keep the nodes `path` [B, M] (the first `counts` [B] of each row, in order of depth) of the last step.

        Their keys and values move to consecutive slots after the committed ones and the rows grow by `counts`.
        """
        if path.shape[1] > 1:
            self._gather(rows, path, counts)
        self.lengths[rows[0]:rows[1]] += counts

    def _gather(self, rows: tuple[int, int], path: Tensor, counts: Tensor) -> None:
        order = torch.arange(path.shape[1], device=path.device)
        moved = (path != order) & (order < counts[:, None])
        if not self.waits:
            pairs = moved.nonzero().tolist()
            if len(pairs) <= MOVED_APART:
                self._move_apart(rows[0], path.tolist(), pairs)
                return
        base = (torch.arange(*rows, device=path.device) * self.slots + self.lengths[rows[0]:rows[1]])[:, None]
        source, target = base + path, base + order
        if self.waits:  # what stays is copied onto itself: a few rows, and the device need not say which they are
            source = torch.where(moved, source, target)
        else:
            source, target = source[moved], target[moved]
        for store in (self.keys, self.values):
            flat = store.view(store.shape[0], -1, *store.shape[3:])
            flat[:, target] = flat[:, source]

    def _move_apart(self, first: int, paths: list[list[int]], pairs: list[list[int]]) -> None:
        """Slots (row, order) of `pairs`, one after the other: none is read after it was written, as paths go down."""
        for row, order in pairs:
            start = int(self.lengths[first + row])
            for store in (self.keys, self.values):
                store[:, first + row, start + order] = store[:, first + row, start + paths[row][order]]

    def move_row(self, source: int, target: int) -> None:
        """Copy one row's committed slots and length over another's."""
        used = int(self.lengths[source])
        self.keys[:, target, :used] = self.keys[:, source, :used]
        self.values[:, target, :used] = self.values[:, source, :used]
        self.lengths[target] = used

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        """Make the first `count` slots of one row those of another, and nothing else."""
        self.keys[:, target, :count] = self.keys[:, source, :count]
        self.values[:, target, :count] = self.values[:, source, :count]
        self.lengths[target] = count

    def clear_rows(self, rows: tuple[int, int]) -> None:
        """Forget what the rows hold."""
        self.lengths[rows[0]:rows[1]] = 0
