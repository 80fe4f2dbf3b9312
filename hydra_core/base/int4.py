"""Packed 4-bit matrices in torch's CPU kernel, holding Q4_1 codes: a checkpoint's own, or such as were made of it.

The kernel computes (q - 8) * scale + zero, so scale = d and zero = m + 8 d. In bfloat16 both are rounded and so is the
value, which is off by less than (8 |d| + |m + 8 d| + |value|) / 256; in float32 it is what the codes say. Its cost
grows with the rows, where a dense bf16 matrix costs as much for one row as for sixteen: many rows take the dense copy,
which rounds values too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.base.q4_1 import GROUP, Q4Matrix

MOST_ROWS = 8
"""Rows up to which the packed kernel is taken. Each row's product is the same to the last bit whatever rows go with it;
only crossing this number changes a rounding."""
OUT_MULTIPLE = 16
"""Rows of a matrix come in so many."""
OPERATIONS = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")


def kernel_missing() -> str | None:
    """Why the kernel cannot be called, or None: it is private to torch, and another version may lack it."""
    lost = [name for name in OPERATIONS if not hasattr(torch.ops.aten, name)]
    return f"torch {torch.__version__} has no {lost[0]}" if lost else None


@dataclass(frozen=True)
class Int4Weight:
    """`packed`: the kernel's own layout of [out, in] codes; `scales`: [in / 32, out, 2] scale and zero."""

    packed: Tensor
    scales: Tensor

    @classmethod
    def of(cls, matrix: Q4Matrix, dtype: torch.dtype = torch.bfloat16) -> Int4Weight:
        scale, minimum = matrix.scale.float(), matrix.minimum.float()
        scales = torch.stack((scale, minimum + 8 * scale), dim=-1).transpose(0, 1).to(dtype).contiguous()
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.codes.to(torch.int32), 2)
        return cls(packed, scales)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] in the scales' dtype to [..., out]."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.reshape(-1, x.shape[-1]), self.packed, GROUP, self.scales)
        return product.view(*x.shape[:-1], -1)
