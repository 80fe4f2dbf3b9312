"""A frozen matrix in the layouts that this machine multiplies fastest.

On a CPU, oneDNN reads a bf16 matrix 1.5 to 2 times as fast once it is reordered, at the few rows a decoding step has;
the products are the same to the last bit. It cannot be differentiated through, so trainers keep the plain layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra_core.base.int4 import MOST_ROWS, Int4Weight
from hydra_core.base.q4_1 import Q4Matrix

EXPECTED_ROWS = 8
"""Rows of a typical step, for oneDNN to choose a layout by; any number works."""


def packable(weight: Tensor) -> bool:
    """Whether this machine has a faster layout for `weight`."""
    return (weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def pack(weight: Tensor) -> Tensor:
    """An opaque copy of [out, in] for `packed_linear`; call it only for what is `packable`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), EXPECTED_ROWS)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a packed matrix."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


@dataclass(frozen=True)
class FrozenLinear:
    """A matrix [out, in], packed or plain, and perhaps a bias [out]; `few`: the same in 4 bits, for few rows."""

    weight: Tensor
    bias: Tensor | None
    packed: bool
    few: Int4Weight | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None, codes: Q4Matrix | None = None) -> FrozenLinear:
        """`codes`: the checkpoint's own 4-bit codes, where they are to be used."""
        few = None if codes is None else Int4Weight.of(codes, weight.dtype)
        if packable(weight):
            return cls(pack(weight), bias, True, few)
        return cls(weight, bias, False, few)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.few is not None and x.numel() <= MOST_ROWS * x.shape[-1]:
            product = self.few(x)
            return product if self.bias is None else product + self.bias
        if self.packed:
            return packed_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class PackableLinear(nn.Linear):
    """A trained layer that can be packed to decode. Training, loading and moving unpack it, so that no stale copy is ever
    used."""

    _packed: Tensor | None = None

    def pack(self) -> None:
        """Make the faster copy, where this machine has one."""
        weight = self.weight.detach()
        self._packed = pack(weight) if packable(weight) else None

    def train(self, mode: bool = True) -> PackableLinear:
        self._packed = None
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> PackableLinear:
        self._packed = None
        super()._apply(*args, **kwargs)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None and not torch.is_grad_enabled():
            return packed_linear(x, self._packed, self.bias)
        return F.linear(x, self.weight, self.bias)
