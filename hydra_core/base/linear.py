"""A frozen matrix in the layout that this machine multiplies fastest.

On a CPU with AVX2 or AVX-512's bf16 dot product this project's own kernels (`kernels/matmul_bf16.h`) read a matrix at the full
speed of the memory. On other CPUs, or where AMX was not compiled in, oneDNN reads a reordered matrix 1.5 to 2 times as fast as a
plain one. Neither layout supports gradients, so trainers keep the plain layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra_core.base.int4 import OUT_MULTIPLE, FewRows, for_few_rows, kernel_missing
from hydra_core.base.q4_1 import Q4Matrix, quantise
from hydra_core.kernels import ops
from hydra_core.kernels.ops import INT4_GROUP

Layout = Literal["plain", "onednn", "blocked"]
LAYOUTS: tuple[Layout, ...] = ("plain", "onednn", "blocked")
"""Numbered as `Layout` in `kernels/linear.h`."""
SCALES_BYTES = 4
"""Bytes of a group's scale and minimum, two each, beside its 4-bit codes."""
EXPECTED_ROWS = 8
"""Rows of a typical step, by which oneDNN chooses a layout; any number works."""


def packable(weight: Tensor) -> bool:
    """Whether this machine has a faster layout for `weight`."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return ops.supports_linear(weight) or (has_onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def quantisable(weight: Tensor) -> bool:
    """Whether a 4-bit copy of `weight` [out, in] would be faster here at few rows."""
    return (packable(weight) and kernel_missing() is None
            and weight.shape[0] % OUT_MULTIPLE == 0 and weight.shape[1] % INT4_GROUP == 0)


def draft_bytes(weight: Tensor) -> int:
    """Bytes that a product with few rows reads of `weight` in the layout of `FrozenLinear.for_drafts`."""
    half_a_byte_and_scales = weight.numel() // 2 + weight.numel() // INT4_GROUP * SCALES_BYTES
    return half_a_byte_and_scales if quantisable(weight) else weight.nbytes


def pack(weight: Tensor) -> tuple[Tensor, Layout]:
    """A copy of `weight` [out, in] for `multiply`, and the copy's layout. The weight must be `packable`."""
    if ops.supports_linear(weight):
        return ops.pack_weight(weight), "blocked"
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), EXPECTED_ROWS), "onednn"


def multiply(x: Tensor, packed: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """`F.linear` of `x` [..., in] with a packed matrix: [..., out]."""
    if layout == "blocked":
        return ops.linear(x.reshape(-1, x.shape[-1]), packed, bias).view(*x.shape[:-1], -1)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


@dataclass(frozen=True)
class FrozenLinear:
    """A matrix [out, in] in some `layout`, with a bias [out] or None; `few`: a 4-bit copy for few rows, or None."""

    weight: Tensor
    bias: Tensor | None
    layout: Layout = "plain"
    few: FewRows | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None, codes: Q4Matrix | None = None) -> FrozenLinear:
        """Pack `weight` in the fastest layout. `codes`: 4-bit codes of the same values, for products of few rows, or None."""
        few = None if codes is None else for_few_rows(codes, weight.dtype)
        packed, layout = pack(weight) if packable(weight) else (weight, LAYOUTS[0])
        return cls(packed, bias, layout, few)

    @classmethod
    def for_drafts(cls, weight: Tensor, bias: Tensor | None = None) -> FrozenLinear:
        """As `of`, with a 4-bit copy made from the weights where that is faster: a product reads a third of the bytes, and a
        wrong draft costs only time."""
        return cls.of(weight, bias, quantise(weight) if quantisable(weight) else None)

    @property
    def bytes_read(self) -> int:
        """Bytes that a product with one row reads, without the bias."""
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
    """A module that may keep a packed copy of itself for decoding. Training, loading and moving it drop the copy, so that no
    stale copy is used."""

    _packed: Any = None

    def train(self, mode: bool = True) -> Packable:
        self._packed = None
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Packable:
        self._packed = None
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)


class PackableLinear(Packable, nn.Linear):
    """A trained layer of a drafter that can be packed for decoding."""

    def pack(self) -> None:
        """Make the packed copy, where this machine has a faster layout."""
        self._packed = self.frozen() if packable(self.weight) else None

    def frozen(self) -> FrozenLinear:
        """The layer in the layout that drafting uses, with a 4-bit copy where that is faster."""
        return FrozenLinear.for_drafts(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is not None and not torch.is_grad_enabled():
            packed: Tensor = self._packed(x)
            return packed
        return F.linear(x, self.weight, self.bias)
