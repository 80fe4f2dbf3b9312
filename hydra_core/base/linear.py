"""A frozen matrix in the layout that this machine multiplies fastest.

On a CPU, oneDNN reads a bf16 matrix 1.5 to 2 times as fast once it is reordered, at the few rows a decoding step has;
the products are the same to the last bit. It cannot be differentiated through, so trainers keep the plain layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """A matrix [out, in], packed or plain, and perhaps a bias [out]."""

    weight: Tensor
    bias: Tensor | None
    packed: bool

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> FrozenLinear:
        if packable(weight):
            return cls(pack(weight), bias, True)
        return cls(weight, bias, False)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.packed:
            return packed_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


class PackableLinear(nn.Linear):
    """A trained layer that can be packed to decode. Switching between training and evaluation unpacks it, so that no
    stale copy is ever used."""

    _packed: Tensor | None = None

    def pack(self) -> None:
        """Make the faster copy, where this machine has one."""
        weight = self.weight.detach()
        self._packed = pack(weight) if packable(weight) else None

    def train(self, mode: bool = True) -> PackableLinear:
        self._packed = None
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None and not torch.is_grad_enabled():
            return packed_linear(x, self._packed, self.bias)
        return F.linear(x, self.weight, self.bias)
