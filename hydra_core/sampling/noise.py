"""Sampling as an argmax: Gumbel noise that is a function of (seed, choice, position, token id) and of nothing else.

A token is argmax(logits / T + noise) (Gumbel-max trick). The noise is the same in any batch and order, so speculative sampling
equals plain sampling with the same seed token for token, and drafters can rank their candidates with the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HIGHEST = 16.64
"""Upper bound of the noise: the largest uniform is 1 - 2**-24, and -log(-log(1 - 2**-24)) = 16.6355."""

_MASK32 = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF

Key = tuple[int, int]


def _mix64(value: int) -> int:
    """splitmix64's finalizer."""
    value = (value ^ (value >> 30)) * 0xBF58_476D_1CE4_E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D0_49BB_1331_11EB & _MASK64
    return value ^ (value >> 31)


def _signed32(value: int) -> int:
    return value - (1 << 32) if value & 0x8000_0000 else value


def position_key(seed: int, position: int, choice: int = 0) -> Key:
    """Two signed 32-bit words for one draw. `choice`: number of the answer where one prompt has several."""
    stream = _mix64((_mix64(seed & _MASK64) + choice * 0xD1B5_4A32_D192_ED03) & _MASK64)
    key = _mix64((stream + position * 0x9E37_79B9_7F4A_7C15) & _MASK64)
    return _signed32(key & _MASK32), _signed32(key >> 32)


def gumbel(keys: Sequence[Key], ids: Tensor) -> Tensor:
    """Standard Gumbel noise [len(keys), len(ids)] float32 for token `ids` [n] int64, one `position_key` per row."""
    words = torch.tensor(keys, dtype=torch.int32, device=ids.device).view(-1, 2)
    return _hashed(ids[None], words[:, :1], words[:, 1:])


def _hashed(ids: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """A 32-bit counter-based hash: two rounds of a low-bias integer mixer with a key word before each."""
    mixed = _mix32((ids.to(torch.int32) * -1640531535) ^ first)
    mixed = _mix32(mixed ^ second)
    uniform = ((mixed >> 9) & 0x7F_FFFF).float().add_(0.5).mul_(2.0 ** -23)  # 23 bits: never rounds to 0 or 1
    return uniform.log_().neg_().log_().neg_()


def _mix32(x: Tensor) -> Tensor:
    """lowbias32 on int32 tensors; products wrap, and shifts are made logical by masking."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed32(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)
