"""Rows of different lengths packed into lines, so that little is computed for padding and no row attends to another.

    line 0   a a a a a b b b b .      segment 0 0 0 0 0 1 1 1 1 -1     position 0 1 2 3 4 0 1 2 3 0
    line 1   c c c c c c c d d d      segment 2 2 2 2 2 2 2 3 3 3      position 0 1 2 3 4 5 6 0 1 2

A token's flat index is line * width + column. The flat indices of a row are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureRow:
    """One answered prompt: `token_ids` [T] int64 (prompt, then response), `hidden` [T, D] after the base's final norm,
    `log_partitions` [T] float32 of the base's softmax at each position, where they are stored.
    """

    token_ids: Tensor
    prompt_tokens: int
    hidden: Tensor
    log_partitions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.hidden.ndim != 2 or self.hidden.shape[0] != self.token_ids.shape[0]:
            raise ValueError(f"hidden {tuple(self.hidden.shape)} does not fit {self.token_ids.shape[0]} tokens")
        if not 0 < self.prompt_tokens <= self.token_ids.shape[0]:
            raise ValueError(f"prompt_tokens {self.prompt_tokens} is outside 1..{self.token_ids.shape[0]}")


@dataclass(frozen=True)
class Spans:
    """The flat token indices of rows: `starts`, `lengths`, `prompt_lengths`, each [R] int64."""

    starts: Tensor
    lengths: Tensor
    prompt_lengths: Tensor

    @property
    def rows(self) -> int:
        return self.starts.shape[0]


@dataclass(frozen=True)
class Packed:
    """Rows in lines of one width: token_ids [B, C] int64, hidden [B, C, D], positions [B, C] int64,
    mask [B, 1, C, C] bool (True where query i may read key j: same row, j <= i), log_partitions [B, C] float32 if stored.
    """

    token_ids: Tensor
    hidden: Tensor
    positions: Tensor
    mask: Tensor
    spans: Spans
    log_partitions: Tensor | None = None

    def to(self, device: torch.device) -> Packed:
        """The same batch on another device."""
        at = self.spans
        spans = Spans(at.starts.to(device), at.lengths.to(device), at.prompt_lengths.to(device))
        stored = None if self.log_partitions is None else self.log_partitions.to(device)
        return Packed(self.token_ids.to(device), self.hidden.to(device), self.positions.to(device),
                      self.mask.to(device), spans, stored)


def assign_lines(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Row numbers of each line: longest first, each into the first line that still has room.

    Raises ValueError if a row is longer than `width`.
    """
    lines: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda r: (-lengths[r], r)):
        if lengths[row] > width:
            raise ValueError(f"row {row} has {lengths[row]} tokens, more than a line of {width}")
        for line, left in enumerate(room):
            if lengths[row] <= left:
                lines[line].append(row)
                room[line] -= lengths[row]
                break
        else:
            lines.append([row])
            room.append(width - lengths[row])
    return lines


def pack_rows(rows: Sequence[FeatureRow], width: int | None = None) -> Packed:
    """Pack `rows` into lines of `width` tokens; without `width`, into one line [1, T].

    Narrow lines keep attention cheap (its cost grows with the line's square); spans stay in the order of `rows`.
    Raises ValueError for no rows or a row longer than `width`.
    """
    if not rows:
        raise ValueError("nothing to pack")
    lengths = [row.token_ids.shape[0] for row in rows]
    lines = assign_lines(lengths, width) if width is not None else [list(range(len(rows)))]
    columns = max(sum(lengths[row] for row in line) for line in lines)
    shape = (len(lines), columns)
    token_ids = torch.zeros(shape, dtype=torch.int64)
    positions = torch.zeros(shape, dtype=torch.int64)
    segments = torch.full(shape, -1, dtype=torch.int64)
    hidden = torch.zeros(*shape, rows[0].hidden.shape[1], dtype=rows[0].hidden.dtype)
    stored = all(row.log_partitions is not None for row in rows)
    log_partitions = torch.zeros(shape) if stored else None
    starts = [0] * len(rows)
    for number, line in enumerate(lines):
        column = 0
        for row in line:
            here = slice(column, column + lengths[row])
            token_ids[number, here] = rows[row].token_ids
            positions[number, here] = torch.arange(lengths[row])
            segments[number, here] = row
            hidden[number, here] = rows[row].hidden
            values = rows[row].log_partitions
            if log_partitions is not None and values is not None:
                log_partitions[number, here] = values
            starts[row] = number * columns + column
            column += lengths[row]
    return Packed(token_ids, hidden, positions, row_mask(segments), Spans(
        torch.tensor(starts), torch.tensor(lengths), torch.tensor([row.prompt_tokens for row in rows])), log_partitions)


def row_mask(segments: Tensor) -> Tensor:
    """[B, 1, C, C] bool from segments [B, C]: same segment and not later.

    Padding is a segment too, so every query attends to something."""
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return (same & causal)[:, None]
