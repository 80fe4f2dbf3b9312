"""Hidden states of a sequence, recorded as its tokens are computed: what a forward over prompt and answer would give again."""

from __future__ import annotations

import torch
from torch import Tensor


class RecordedStates:
    """The base's hidden states of one sequence, in order, in the host's memory: [room, D], of which the first `count` are known.

    `room`: the most tokens that prompt and answer can have together.
    """

    def __init__(self, room: int, width: int, dtype: torch.dtype) -> None:
        self._states = torch.empty(room, width, dtype=dtype)
        self.count = 0

    def append(self, states: Tensor) -> None:
        """Add states [n, D] of the tokens that follow. Those past the room belong to drafts behind the answer's end."""
        states = states[:len(self._states) - self.count]
        self._states[self.count:self.count + len(states)] = states
        self.count += len(states)

    def copy_prefix(self, source: RecordedStates, count: int) -> None:
        """The first `count` tokens are those of `source`."""
        self._states[:count] = source._states[:count]
        self.count = count

    def first(self, count: int) -> Tensor:
        """The states of the first `count` tokens: [count, D], a copy without the room behind them."""
        return self._states[:count].clone()
