"""Which positions each head reads and which token it must predict: the one place that knows the offsets.

    position          t        t+1       t+2       t+3
    token             x_t      x_{t+1}   x_{t+2}   x_{t+3}
    base hidden       h_t      h_{t+1}   h_{t+2}   h_{t+3}      (last layer, after the final norm)
    base predicts     x_{t+1}  x_{t+2}   ...

    head 0 at t reads h_t, e(x_{t+1})                    and predicts x_{t+2}; its teacher is lm_head(h_{t+1})
    head 1 at t reads h_t, e(x_{t+1}), e(x_{t+2})        and predicts x_{t+3}; its teacher is lm_head(h_{t+2})
    head i at t reads h_t, e(x_{t+1}) ... e(x_{t+1+i})   and predicts x_{t+2+i}; its teacher is lm_head(h_{t+1+i})

A position counts for head i when x_{t+2+i} is a response token of the same row; the teacher position t+1+i lies before
it, so it is inside the row too. While decoding, the earliest t is the last prompt position: its root x_{t+1} is the first
response token. Training may start earlier, with prompt tokens in the path, as long as the target is the response's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.training.packing import Spans


@dataclass(frozen=True)
class HeadSlice:
    """Flat indices of one head's n positions, int64: features [n] (t), path [n, i+1], target [n], teacher [n]."""

    features: Tensor
    path: Tensor
    target: Tensor
    teacher: Tensor

    @property
    def count(self) -> int:
        return self.features.shape[0]

    def only(self, wanted: Tensor) -> HeadSlice:
        """The positions where `wanted` [n] bool is true."""
        return HeadSlice(self.features[wanted], self.path[wanted], self.target[wanted], self.teacher[wanted])


def head_slice(head: int, spans: Spans, *, decoding: bool = False) -> HeadSlice:
    """Positions of head `head` in packed rows, row by row in order.

    `decoding=True` keeps only positions at which a decoder drafts (t from the last prompt token on).
    """
    first = spans.prompt_lengths - (1 if decoding else 2 + head)
    features = _ranges(spans.starts, first.clamp(min=0), spans.lengths - 2 - head)
    offsets = torch.arange(1, head + 2, device=features.device)
    return HeadSlice(features, features[:, None] + offsets, features + 2 + head, features + 1 + head)


def head_slice_count(head: int, prompt_tokens: int, tokens: int) -> int:
    """The number of positions of `head_slice` for one row, without building them."""
    return max(0, tokens - 2 - head - max(0, prompt_tokens - 2 - head))


def target_range(head: int, prompt_tokens: int, tokens: int) -> range:
    """Offsets in a row of the tokens that head `head` must predict."""
    return range(max(prompt_tokens, 2 + head), max(prompt_tokens, 2 + head, tokens))


def teacher_positions(spans: Spans) -> Tensor:
    """Flat indices [M] of every position that is the teacher of some head: the union over heads, row by row."""
    first = (spans.prompt_lengths - 1).clamp(min=1)
    return _ranges(spans.starts, first, spans.lengths - 1)


def feature_positions(spans: Spans, heads: int) -> Tensor:
    """Flat indices of every t at which one of the first `heads` heads learns or drafts."""
    return _ranges(spans.starts, (spans.prompt_lengths - 1 - heads).clamp(min=0), spans.lengths - 2)


def draft_positions(spans: Spans) -> Tensor:
    """Flat indices [P] of t at every step that a decoder could take: the last prompt token to the last but two of the row.

    That is one position less than response tokens per row: the first response token comes from the prefill.
    """
    return _ranges(spans.starts, spans.prompt_lengths - 1, spans.lengths - 2)


def _ranges(starts: Tensor, first: Tensor, stop: Tensor) -> Tensor:
    """Concatenated starts + [first, stop) of every row; empty where stop <= first."""
    counts = (stop - first).clamp(min=0)
    row = torch.repeat_interleave(torch.arange(len(starts), device=starts.device), counts)
    before = torch.cumsum(counts, 0) - counts
    within = torch.arange(int(counts.sum()), device=starts.device) - before[row]
    return (starts + first)[row] + within
