"""Packed 4-bit matrices of Q4_1 codes: those that a checkpoint stores, or codes that were made from its weights.

`BlockedInt4Weight` multiplies by this project's own kernel (`kernels/matmul_int4.h`) on processors with AVX2 or AVX-512's bf16
dot product: codes are exact in bfloat16, scale and minimum keep the file's float16 values, sums are float32. `Int4Weight` is
torch's CPU kernel, for other processors. It computes (q - 8) * scale + zero, so scale = d and zero = m + 8 d. In bfloat16 both
are rounded, and so is the value, which is off by less than (8 |d| + |m + 8 d| + |value|) / 256; in float32 it is exactly the
code's value. The cost of a 4-bit product grows with its rows, while a dense bf16 matrix costs as much for one row as for
sixteen. So products of many rows use the dense copy, which rounds values too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.base.q4_1 import Q4Matrix
from hydra_core.kernels import ops
from hydra_core.kernels.ops import INT4_GROUP

MOST_ROWS = 8
"""Rows of a product up to which torch's kernel is used. Each row's product is the same to the last bit whatever rows are
multiplied with it; only crossing this number changes a rounding."""
MOST_OURS, MOST_BESIDE_AMX = 16, 4
"""The same for this project's own kernel; and on a processor with AMX, whose tiles multiply by the dense copy as fast from a few
rows on (SmolLM2-135M, a step of 4-bit codes against dense: 10.7 and 10.1 ms for four rows, 17.6 and 11.0 for eight, 30.8 and
12.5 for sixteen)."""
OUT_MULTIPLE = 16
"""A packed matrix must have a multiple of this many outputs."""
OPERATIONS = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")


def kernel_missing() -> str | None:
    """Why torch's kernel cannot be called, or None. It is private to torch, so another version may lack it."""
    lost = [name for name in OPERATIONS if not hasattr(torch.ops.aten, name)]
    return f"torch {torch.__version__} has no {lost[0]}" if lost else None


@dataclass(frozen=True)
class Int4Weight:
    """`packed`: torch's own layout of [out, in] codes; `scales`: [in / 32, out, 2] scale and zero; `most`: rows of a
    product up to which it is used."""

    packed: Tensor
    scales: Tensor
    most: int = MOST_ROWS

    @classmethod
    def of(cls, matrix: Q4Matrix, dtype: torch.dtype = torch.bfloat16) -> Int4Weight:
        scale, minimum = matrix.scale.float(), matrix.minimum.float()
        scales = torch.stack((scale, minimum + 8 * scale), dim=-1).transpose(0, 1).to(dtype).contiguous()
        packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix.codes.to(torch.int32), 2)
        return cls(packed, scales)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] in the scales' dtype to [..., out]."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.reshape(-1, x.shape[-1]), self.packed, INT4_GROUP, self.scales)
        return product.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class BlockedInt4Weight:
    """`packed`: [out / 32, in / 8, 2, 16, 2] int16 of four codes each, those of inputs 2 j and 2 j + 1 in bits 4 j; `scales`:
    [out / 32, in / 32, 2, 32] float16, scale and minimum; `most`: rows of a product up to which it is used."""

    packed: Tensor
    scales: Tensor
    most: int = MOST_OURS

    @classmethod
    def of(cls, matrix: Q4Matrix) -> BlockedInt4Weight:
        out, width = matrix.codes.shape
        blocks = out // ops.BLOCK
        parts = matrix.codes.to(torch.int32).view(blocks, 2, 16, width // 8, 4, 2).permute(0, 3, 1, 2, 5, 4)
        packed = (parts << (4 * torch.arange(4, dtype=torch.int32))).sum(-1).to(torch.int16).contiguous()
        scales = torch.stack([part.view(blocks, ops.BLOCK, -1).transpose(1, 2) for part in (matrix.scale, matrix.minimum)], 2)
        return cls(packed, scales.half().contiguous(), MOST_BESIDE_AMX if ops.amx_available() else MOST_OURS)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] in bfloat16 to [..., out]."""
        product = ops.linear_int4(x.reshape(-1, x.shape[-1]), self.packed, self.scales)
        return product.view(*x.shape[:-1], -1)


FewRows = Int4Weight | BlockedInt4Weight


def for_few_rows(matrix: Q4Matrix, dtype: torch.dtype) -> FewRows:
    """The codes of `matrix` in the layout that is fastest on this machine for products with few rows of `dtype`."""
    out, width = matrix.codes.shape
    if ops.supports_linear_int4(dtype, out, width):
        return BlockedInt4Weight.of(matrix)
    return Int4Weight.of(matrix, dtype)
