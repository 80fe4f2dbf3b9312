"""A preallocated key/value cache in which every row has its own length. A row holds one sequence.

Letters: L layers, R rows of the cache, B rows in this step, N tokens (tree nodes) per row in this step, S slots per row,
H key/value heads, d head width. A row's slots 0..n-1 hold committed tokens; a step writes its N nodes to n..n+N-1, and
`commit` moves the accepted nodes to consecutive slots. Slots at and past a row's length are never visible, so nothing needs
to be cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.tree.batch import TreeBatch


@dataclass(frozen=True)
class AttentionMetadata:
    """Where one forward of B rows x N nodes reads and writes.

    `rows`: the cache rows [start, stop); `positions`: [B, N] int64; `slots`: [B, N] int64, where the nodes are written;
    `kv_len`: slots of each row that attention reads; `mask`: additive [B, 1, N, kv_len] in the cache's dtype, or None when every
    node sees all `kv_len` slots; `fixed`: the caller gave `kv_len`, which may be longer than the rows need, so only the device
    knows which slots the nodes take.
    """

    rows: tuple[int, int]
    positions: Tensor
    slots: Tensor
    kv_len: int
    mask: Tensor | None
    fixed: bool = False

    def windowed(self, window: int) -> Tensor:
        """The mask of a layer with a sliding window of `window` positions, the node's own included: additive [B, 1, N, kv_len]
        float32."""
        batch = self.slots.shape[0]
        keys = torch.arange(self.kv_len, device=self.slots.device).expand(batch, -1).scatter(1, self.slots, self.positions)
        far = keys[:, None, None, :] <= self.positions[:, None, :, None] - window
        seen = torch.zeros(far.shape, device=far.device) if self.mask is None else self.mask.float()
        return seen.masked_fill(far, float("-inf"))


def real_nodes(counts: Tensor | None, nodes: int) -> Tensor | None:
    """Which nodes are real, where each of B rows has `counts` [B] of them: [B, nodes] bool on the host, None if all are."""
    if counts is None or int(counts.min()) == nodes:
        return None
    return torch.arange(nodes) < counts[:, None]


MAX_MASKS_BY_ROW = 8
"""For up to this many rows, masks are made row by row, which takes less time than a dozen operations on all rows."""
MAX_MOVES_BY_SLOT = 12
"""Up to this many slots are moved one by one, which takes less time than one indexed copy of all of them."""


class KVCache:
    """Keys and values of R rows x S slots for L layers, allocated once."""

    def __init__(self, layers: int, rows: int, slots: int, heads: int, width: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> None:
        self.keys = torch.zeros(layers, rows, slots, heads, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rows, self.slots = rows, slots
        self.waits = self.keys.device.type != "cpu"  # reading a value back waits for all work queued on the device
        self._slot_range = torch.arange(slots, device=device)

    @staticmethod
    def bytes_for(layers: int, rows: int, slots: int, heads: int, width: int, dtype: torch.dtype) -> int:
        """Bytes that a cache of these sizes takes."""
        return 2 * layers * rows * slots * heads * width * dtype.itemsize

    def like(self, rows: int, slots: int) -> KVCache:
        """An empty cache of other sizes for the same layers."""
        layers, _, _, heads, width = self.keys.shape
        return KVCache(layers, rows, slots, heads, width, self.dtype, self.keys.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def build_metadata(self, rows: tuple[int, int], trees: TreeBatch, kv_len: int | None = None,
                       written: int = 0) -> AttentionMetadata:
        """Positions, slots and mask of a forward over `trees`, after the committed tokens of `rows`.

        `kv_len`: slots that attention reads, if the caller knows that they cover every row that matters. No value is then read
        back from the device, and a row without room for the nodes writes them to its last slots. `written`: so many nodes, the
        first ones, are in the cache already; the forward is of the others.
        Raises ValueError when `kv_len` is None and a row has no room for the nodes.
        """
        lengths, nodes, fixed = self.lengths[rows[0]:rows[1]], trees.size, kv_len is not None
        trees = trees.to(lengths.device)
        if kv_len is None:
            longest = int(lengths.max())
            if longest + nodes > self.slots:
                raise ValueError(f"{nodes} nodes on top of {longest} tokens do not fit {self.slots} slots")
            kv_len = longest + nodes
        else:
            lengths = lengths.clamp(max=self.slots - nodes)
        positions = lengths[:, None] + trees.depths
        slots = lengths[:, None] + self._slot_range[:nodes]
        if nodes == 1 and len(lengths) == 1 and not fixed:
            return AttentionMetadata(rows, positions, slots, kv_len, None)
        by_row = not (fixed or self.waits) and len(lengths) <= MAX_MASKS_BY_ROW
        mask = self._mask_by_row(lengths.tolist(), trees, kv_len) if by_row else self._mask(lengths, trees, kv_len)
        if written:
            positions, slots, mask = positions[:, written:], slots[:, written:], mask[:, :, written:].contiguous()
        return AttentionMetadata(rows, positions, slots.contiguous(), kv_len, mask, fixed)

    def _mask(self, lengths: Tensor, trees: TreeBatch, kv_len: int) -> Tensor:
        """A node sees its row's committed slots and its ancestors: additive [B, 1, N, kv_len]."""
        nodes = trees.size
        offset = self._slot_range[:kv_len] - lengths[:, None]                     # [B, kv_len], node index of a slot
        inside = (offset >= 0) & (offset < nodes)
        index = offset.clamp(0, nodes - 1)[:, None].expand(-1, nodes, -1)       # [B, N, kv_len]
        seen = trees.ancestors.expand(len(lengths), -1, -1).gather(2, index) & inside[:, None]
        seen |= (offset < 0)[:, None]
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=lengths.device)
        return mask.masked_fill_(~seen, float("-inf"))[:, None]

    def _mask_by_row(self, lengths: Sequence[int], trees: TreeBatch, kv_len: int) -> Tensor:
        """As `_mask`, row by row on the host: only the last slots of a row hold hidden nodes."""
        mask = torch.zeros(len(lengths), 1, trees.size, kv_len, dtype=self.dtype)
        hidden = ~trees.ancestors
        for row, length in enumerate(lengths):
            end = min(length + trees.size, kv_len)
            own = hidden[row if len(hidden) > 1 else 0, :, :end - length]
            mask[row, 0, :, length:end].masked_fill_(own, float("-inf"))
            if end < kv_len:
                mask[row, 0, :, end:] = float("-inf")
        return mask

    def write(self, layer: int, metadata: AttentionMetadata, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, N, H, d]; return views [B, H, kv_len, d] of all that attention reads."""
        start, stop = metadata.rows
        stored_keys, stored_values = self.keys[layer, start:stop], self.values[layer, start:stop]
        if stop - start == 1 and not metadata.fixed:
            nodes = keys.shape[1]
            first = metadata.kv_len - nodes
            stored_keys[:, first:metadata.kv_len] = keys
            stored_values[:, first:metadata.kv_len] = values
        else:
            batch = torch.arange(stop - start, device=keys.device)[:, None]
            stored_keys[batch, metadata.slots] = keys
            stored_values[batch, metadata.slots] = values
        return stored_keys[:, :metadata.kv_len].transpose(1, 2), stored_values[:, :metadata.kv_len].transpose(1, 2)

    def commit(self, rows: tuple[int, int], path: Tensor, counts: Tensor, forest: bool = False) -> None:
        """Keep the accepted nodes of the last step: the first `counts` [B] of `path` [B, M] in each row, in order of depth.

        Their keys and values move to consecutive slots after the committed tokens, and the rows' lengths grow by `counts`.
        `forest`: a path may begin at any node, not at node 0 alone.
        """
        if path.shape[1] > 1 or forest:
            self._gather(rows, path, counts)
        self.lengths[rows[0]:rows[1]] += counts

    def _gather(self, rows: tuple[int, int], path: Tensor, counts: Tensor) -> None:
        order = torch.arange(path.shape[1], device=path.device)
        moved = (path != order) & (order < counts[:, None])
        if not self.waits:
            pairs = moved.nonzero().tolist()
            if len(pairs) <= MAX_MOVES_BY_SLOT:
                self._move_by_slot(rows[0], path.tolist(), pairs)
                return
        base = (torch.arange(*rows, device=path.device) * self.slots + self.lengths[rows[0]:rows[1]])[:, None]
        source, target = base + path, base + order
        if self.waits:  # copy slots that stay onto themselves, instead of reading back which they are
            source = torch.where(moved, source, target)
        else:
            source, target = source[moved], target[moved]
        for store in (self.keys, self.values):
            flat = store.view(store.shape[0], -1, *store.shape[3:])
            flat[:, target] = flat[:, source]

    def _move_by_slot(self, first: int, paths: list[list[int]], pairs: list[list[int]]) -> None:
        """Move the slots (row, order) of `pairs` one by one. A path goes down the tree, so no slot is read after its write."""
        for row, order in pairs:
            start = int(self.lengths[first + row])
            for store in (self.keys, self.values):
                store[:, first + row, start + order] = store[:, first + row, start + paths[row][order]]

    def move_row(self, source: int, target: int) -> None:
        """Copy the committed slots and the length of row `source` to row `target`."""
        used = int(self.lengths[source])
        self.keys[:, target, :used] = self.keys[:, source, :used]
        self.values[:, target, :used] = self.values[:, source, :used]
        self.lengths[target] = used

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` slots of row `source` to row `target`, whose length becomes `count`."""
        self.keys[:, target, :count] = self.keys[:, source, :count]
        self.values[:, target, :count] = self.values[:, source, :count]
        self.lengths[target] = count

    def clear_rows(self, rows: tuple[int, int]) -> None:
        """Set the lengths of the rows to 0."""
        self.lengths[rows[0]:rows[1]] = 0
