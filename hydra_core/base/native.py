"""Decoding steps and draft heads of `native.cpp`: what they do without Python between their operations.

A step of a small model is some thousand operations of a few microseconds each, and Python takes as long between them. Where
there is no C++ compiler the same steps run through PyTorch's operators, with one log line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hydra_core.base.kv_cache import KVCache, Step, real_nodes
from hydra_core.base.linear import LAYOUTS, FrozenLinear
from hydra_core.base.q4_1 import GROUP
from hydra_core.kernels import ops

if TYPE_CHECKING:
    from hydra_core.base.layer import LayerWeights

MOST_TOKENS = 256
"""Tokens of all rows together that a native step takes in float32 or by oneDNN: some of its loops run on one core, PyTorch's
on all of them. Those of `rows.h` run on all of them too."""


def is_native(tokens: int, dtype: torch.dtype) -> bool:
    """Whether a forward of so many tokens in `dtype` is sooner done by the native step."""
    return tokens <= MOST_TOKENS or (dtype == torch.bfloat16 and ops.bf16_available())


def native_decoder(layers: Sequence[LayerWeights], heads: int, kv_heads: int, width: int,
                   eps: float) -> ops.NativeDecoder | None:
    """The layers as an object with the C++ `run`, or None where it cannot be had: off the CPU, in float64, without a
    compiler."""
    weight = layers[0].input_norm
    if not ops.supports_decoder(weight.device, weight.dtype, width):
        return None
    head_eps = next((layer.head_norms.eps for layer in layers if layer.head_norms), eps)
    made = ops.make_decoder(heads, kv_heads, width, eps, head_eps)
    for layer in layers:
        norms = layer.head_norms
        matrices = [layer.qkv, layer.output, layer.gate_up, layer.down]
        made.add([layer.input_norm, layer.mlp_norm, norms.query if norms else None, norms.key if norms else None],
                 [_parts(matrix) for matrix in matrices], [_layout(matrix) for matrix in matrices], GROUP)
    return made


def real_tokens(shape: Sequence[int], counts: Tensor | None) -> int:
    """How many of B rows x N tokens (`shape`) are real: the first `counts` [B] of each, or all."""
    return shape[0] * shape[1] if counts is None else int(counts.sum())


def run_natively(decoder: ops.NativeDecoder, hidden: Tensor, cache: KVCache, step: Step, cos: Tensor, sin: Tensor,
                 counts: Tensor | None = None) -> Tensor:
    """All layers of a `native_decoder`: [B, N, D] float32 in, which may be overwritten, and out.

    `counts`: [B] int64, how many nodes of each row, the first ones, are real. Nothing is computed or stored for the others,
    which come out as zeros.
    """
    real = real_nodes(counts, hidden.shape[1])
    given = (cache.keys, cache.values, step.rows[0], step.slots, step.span, cos, sin, step.mask)
    if real is None:
        return hidden + decoder.run(hidden, *given, None).view_as(hidden)
    lines = hidden[real]
    added = decoder.run(lines, *given, counts)
    return hidden.zero_().masked_scatter_(real[..., None], lines + added)


def native_head(blocks: Sequence[Sequence[FrozenLinear]], widens: Sequence[bool], norm: Tensor | None, eps: float,
                rows: FrozenLinear, scale: float, softcap: float | None) -> ops.NativeHead | None:
    """A draft head as an object with the C++ `logits` and `top_k`, or None where it cannot be had: in another dtype than
    bfloat16, off the CPU, without a compiler.

    `blocks`: the one or two matrices of each, as the source has them; `widens`: whether its input is wider than its output;
    `norm`: [D] that ends the head; `rows`: the base's vocabulary projection, with its `scale` and `softcap`.
    """
    first = blocks[0][0]
    if not ops.supports_head(first.weight.device, first.weight.dtype):
        return None
    made = ops.make_head(None if norm is None else norm.float().contiguous(), eps, scale, softcap or 0.0)
    for matrices, widened in zip(blocks, widens, strict=True):
        made.add([_parts(matrix) for matrix in matrices], [_layout(matrix) for matrix in matrices], widened, GROUP)
    made.end(_parts(rows), _layout(rows), GROUP)
    return made


def _parts(matrix: FrozenLinear) -> list[Tensor | None]:
    few = matrix.few
    return [matrix.weight, matrix.bias, few.packed if few else None, few.scales if few else None]


def _layout(matrix: FrozenLinear) -> tuple[int, int]:
    """The number of its layout, and the rows up to which its 4-bit copy is taken."""
    return LAYOUTS.index(matrix.layout), matrix.few.most if matrix.few else 0
