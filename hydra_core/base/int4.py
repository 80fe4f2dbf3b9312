"""Packed 4-bit matrices holding Q4_1 codes: a checkpoint's own, or such as were made of it.

`RowsInt4Weight` multiplies by our own loops (`rows.h`) on processors with AVX-512's bf16 dot product: codes are exact in
bfloat16, scale and minimum stay as the file has them, sums are float32. `Int4Weight` is torch's CPU kernel, for the rest. It
computes (q - 8) * scale + zero, so scale = d and zero = m + 8 d. In bfloat16 both are rounded and so is the
value, which is off by less than (8 |d| + |m + 8 d| + |value|) / 256; in float32 it is what the codes say. Its cost
grows with the rows, where a dense bf16 matrix costs as much for one row as for sixteen: many rows take the dense copy,
which rounds values too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.base.q4_1 import GROUP, Q4Matrix
from hydra_core.kernels import ops

MOST_ROWS = 8
"""Rows up to which torch's kernel is taken. Each row's product is the same to the last bit whatever rows go with it;
only crossing this number changes a rounding."""
MOST_OURS, MOST_BESIDE_TILES = 16, 4
"""The same for our own kernel, and on a processor with AMX, whose tiles multiply by the dense copy in the same time from a few
rows on (SmolLM2-135M: 10.7 ms a step of four rows against 10.1, 17.6 against 11.0 of eight, 30.8 against 12.5 of sixteen)."""
OUT_MULTIPLE = 16
"""Rows of a matrix come in so many."""
OPERATIONS = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")


def kernel_missing() -> str | None:
    """Why the kernel cannot be called, or None: it is private to torch, and another version may lack it."""
    lost = [name for name in OPERATIONS if not hasattr(torch.ops.aten, name)]
    return f"torch {torch.__version__} has no {lost[0]}" if lost else None


@dataclass(frozen=True)
class Int4Weight:
    """`packed`: torch's own layout of [out, in] codes; `scales`: [in / 32, out, 2] scale and zero; `most`: rows up to which
    it is taken."""

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
            x.reshape(-1, x.shape[-1]), self.packed, GROUP, self.scales)
        return product.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class RowsInt4Weight:
    """`packed`: [out / 32, in / 8, 2, 16, 2] int16 of four codes each, those of inputs 2 j and 2 j + 1 in bits 4 j; `scales`:
    [out / 32, in / 32, 2, 32] float16, scale and minimum; `most`: rows up to which it is taken."""

    packed: Tensor
    scales: Tensor
    most: int = MOST_OURS

    @classmethod
    def of(cls, matrix: Q4Matrix) -> RowsInt4Weight:
        out, width = matrix.codes.shape
        blocks = out // ops.BLOCK
        parts = matrix.codes.to(torch.int32).view(blocks, 2, 16, width // 8, 4, 2).permute(0, 3, 1, 2, 5, 4)
        packed = (parts << (4 * torch.arange(4, dtype=torch.int32))).sum(-1).to(torch.int16).contiguous()
        scales = torch.stack([part.view(blocks, ops.BLOCK, -1).transpose(1, 2) for part in (matrix.scale, matrix.minimum)], 2)
        return cls(packed, scales.half().contiguous(), MOST_BESIDE_TILES if ops.amx_available() else MOST_OURS)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] in bfloat16 to [..., out]."""
        product = ops.linear_int4(x.reshape(-1, x.shape[-1]), self.packed, self.scales)
        return product.view(*x.shape[:-1], -1)


FewRows = Int4Weight | RowsInt4Weight


def for_few_rows(matrix: Q4Matrix, dtype: torch.dtype) -> FewRows:
    """Codes in the layout that this machine multiplies few rows of `dtype` by fastest."""
    out, width = matrix.codes.shape
    if ops.supports_linear_int4(dtype, out, width):
        return RowsInt4Weight.of(matrix)
    return Int4Weight.of(matrix, dtype)
