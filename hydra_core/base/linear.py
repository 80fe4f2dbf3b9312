"""A frozen matrix in the layouts that this machine multiplies fastest.

On a CPU with AVX-512's bf16 dot product a loop of our own (`rows.h`) reads a matrix at the memory's full speed; where there
is none, or AMX, oneDNN reads it 1.5 to 2 times as fast once it is reordered. Neither can be differentiated through, so
trainers keep the plain layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra_core.base.int4 import OUT_MULTIPLE, FewRows, for_few_rows, kernel_missing
from hydra_core.base.q4_1 import GROUP, Q4Matrix, quantise
from hydra_core.kernels import ops

Layout = Literal["plain", "onednn", "blocked"]
LAYOUTS: tuple[Layout, ...] = ("plain", "onednn", "blocked")
"""As numbered in `native.cpp`."""
SCALES_BYTES = 4
"""Of a group of 4-bit codes: a scale and a minimum, of two bytes each."""
EXPECTED_ROWS = 8
"""Rows of a typical step, for oneDNN to choose a layout by; any number works."""


def packable(weight: Tensor) -> bool:
    """Whether this machine has a faster layout for `weight`."""
    return (weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
            and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def quantisable(weight: Tensor) -> bool:
    """Whether a 4-bit copy of `weight` [out, in] would be faster here at few rows."""
    return (packable(weight) and kernel_missing() is None
            and weight.shape[0] % OUT_MULTIPLE == 0 and weight.shape[1] % GROUP == 0)


def draft_bytes(weight: Tensor) -> int:
    """Memory that a product with few rows reads of `weight` as `FrozenLinear.for_drafts` lays it out."""
    half_a_byte_and_scales = weight.numel() // 2 + weight.numel() // GROUP * SCALES_BYTES
    return half_a_byte_and_scales if quantisable(weight) else weight.nbytes


def pack(weight: Tensor) -> tuple[Tensor, Layout]:
    """An opaque copy of [out, in] for `multiply`, and its layout; call it only for what is `packable`."""
    if ops.supports_linear(weight):
        return ops.pack_weight(weight), "blocked"
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), EXPECTED_ROWS), "onednn"


def multiply(x: Tensor, packed: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """`F.linear` with a packed matrix."""
    if layout == "blocked":
        return ops.linear(x.reshape(-1, x.shape[-1]), packed, bias).view(*x.shape[:-1], -1)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


@dataclass(frozen=True)
class FrozenLinear:
    """A matrix [out, in] in some `layout`, and perhaps a bias [out]; `few`: the same in 4 bits, for few rows."""

    weight: Tensor
    bias: Tensor | None
    layout: Layout = "plain"
    few: FewRows | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None, codes: Q4Matrix | None = None) -> FrozenLinear:
        """`codes`: 4-bit codes of the same values, where they are to be used."""
        few = None if codes is None else for_few_rows(codes, weight.dtype)
        packed, layout = pack(weight) if packable(weight) else (weight, LAYOUTS[0])
        return cls(packed, bias, layout, few)

    @classmethod
    def for_drafts(cls, weight: Tensor, bias: Tensor | None = None) -> FrozenLinear:
        """With a 4-bit copy made of the weights, where there is a faster kernel for it: a draft may be wrong, and a third
        of the bytes is read."""
        return cls.of(weight, bias, quantise(weight) if quantisable(weight) else None)

    @property
    def bytes_read(self) -> int:
        """Memory that a product with one row reads, biases left out."""
        if self.few is not None:
            return self.few.packed.nbytes + self.few.scales.nbytes
        return self.weight.numel() * self.weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if self.few is not None and x.numel() <= self.few.most * x.shape[-1]:
            product = self.few(x)
            return product if self.bias is None else product + self.bias
        if self.layout != "plain":
            return multiply(x, self.weight, self.layout, self.bias)
        return F.linear(x, self.weight, self.bias)


class Packable(nn.Module):
    """A module that may keep a copy of itself in the layout that decodes fastest. Training, loading and moving drop the
    copy, so that no stale one is ever used."""

    _packed: Any = None

    def train(self, mode: bool = True) -> Packable:
        self._packed = None
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Packable:
        self._packed = None
        super()._apply(*args, **kwargs)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)


class PackableLinear(Packable, nn.Linear):
    """A trained layer of a drafter that can be packed to decode."""

    def pack(self) -> None:
        """Make the faster copy, where this machine has one."""
        self._packed = self.frozen() if packable(self.weight) else None

    def frozen(self) -> FrozenLinear:
        """The layer as drafting multiplies by it: perhaps in 4 bits."""
        return FrozenLinear.for_drafts(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None and not torch.is_grad_enabled():
            packed: Tensor = self._packed(x)
            return packed
        return F.linear(x, self.weight, self.bias)
