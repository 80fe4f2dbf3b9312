"""Decoding steps and draft heads as one C++ call each, made of the base's own classes.

A step of a small model is about a thousand operations of a few microseconds each, and Python takes as long between them.
Without a C++ compiler the same steps run through PyTorch's operators; the library logs that once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hydra_core.base.kv_cache import AttentionMetadata, KVCache, real_nodes
from hydra_core.base.linear import LAYOUTS, FrozenLinear
from hydra_core.kernels import ops
from hydra_core.kernels.ops import INT4_GROUP

if TYPE_CHECKING:
    from hydra_core.base.layer import LayerWeights

MOST_TOKENS = 256
"""Largest number of tokens, over all rows, for which a native step is used in float32 or with oneDNN's layouts: some of its
loops then run on one core, while PyTorch's run on all. The bfloat16 kernels run on all cores and have no such limit."""


def is_native(tokens: int, dtype: torch.dtype) -> bool:
    """Whether the native step is the faster one for a forward of `tokens` tokens in `dtype`."""
    return tokens <= MOST_TOKENS or (dtype == torch.bfloat16 and ops.bf16_available())


def native_decoder(layers: Sequence[LayerWeights], heads: int, kv_heads: int, width: int,
                   eps: float) -> ops.NativeDecoder | None:
    """The layers as a C++ object, or None where there is none: off the CPU, in float64, without a compiler."""
    weight = layers[0].input_norm
    if not ops.supports_decoder(weight.device, weight.dtype, width):
        return None
    head_eps = next((layer.head_norms.eps for layer in layers if layer.head_norms), eps)
    made = ops.make_decoder(heads, kv_heads, width, eps, head_eps)
    for layer in layers:
        norms = layer.head_norms
        matrices = [layer.qkv, layer.output, layer.gate_up, layer.down]
        made.add([layer.input_norm, layer.mlp_norm, norms.query if norms else None, norms.key if norms else None],
                 [_parts(matrix) for matrix in matrices], [_layout(matrix) for matrix in matrices], INT4_GROUP)
    return made


def real_tokens(shape: Sequence[int], counts: Tensor | None) -> int:
    """How many tokens of a batch of `shape` (B, N) are real: the first `counts` [B] of each row, or all without `counts`."""
    return shape[0] * shape[1] if counts is None else int(counts.sum())


def run_natively(decoder: ops.NativeDecoder, hidden: Tensor, cache: KVCache, metadata: AttentionMetadata, cos: Tensor,
                 sin: Tensor, counts: Tensor | None = None, taps: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
    """Run all layers of a `native_decoder` on `hidden` [B, N, D] float32, which may be overwritten; returns [B, N, D] float32,
    and what enters each of the layers `taps`, as much each.

    `counts`: [B] int64, how many nodes of each row, the first ones, are real; None if all are. Nothing is computed or stored
    for the others, and their results are zero.
    """
    real = real_nodes(counts, hidden.shape[1])
    given = (cache.keys, cache.values, metadata.rows[0], metadata.slots, metadata.kv_len, cos, sin, metadata.mask,
             None if real is None else counts)
    lines = hidden if real is None else hidden[real]
    tapped = lines.new_empty(len(taps), *lines.shape)
    added = decoder.run_tapped(lines, *given, list(taps), tapped) if taps else decoder.run(lines, *given)
    if real is None:
        return hidden + added.view_as(hidden), list(tapped)
    places = real[..., None]
    found = [torch.zeros_like(hidden).masked_scatter_(places, tap) for tap in tapped]
    return hidden.zero_().masked_scatter_(places, lines + added), found


def native_head(blocks: Sequence[Sequence[FrozenLinear]], widens: Sequence[bool], norm: Tensor | None, eps: float,
                rows: FrozenLinear, scale: float, softcap: float | None) -> ops.NativeHead | None:
    """A draft head as a C++ object, or None where there is none: in another dtype than bfloat16, off the CPU, without a compiler.

    `blocks`: the one or two matrices of each block, in the order that `draft_head.h` describes; `widens`: for each block, whether
    its input is wider than its output; `norm`: [D] at the head's end, or None; `rows`: the base's vocabulary projection, with its
    `scale` and `softcap`.
    """
    first = blocks[0][0]
    if not ops.supports_head(first.weight.device, first.weight.dtype):
        return None
    made = ops.make_head(None if norm is None else norm.float().contiguous(), eps, scale, softcap or 0.0)
    for matrices, widened in zip(blocks, widens, strict=True):
        made.add([_parts(matrix) for matrix in matrices], [_layout(matrix) for matrix in matrices], widened, INT4_GROUP)
    made.end(_parts(rows), _layout(rows), INT4_GROUP)
    return made


def _parts(matrix: FrozenLinear) -> list[Tensor | None]:
    """Weight, bias, 4-bit codes and scales, as C++ takes them."""
    few = matrix.few
    return [matrix.weight, matrix.bias, few.packed if few else None, few.scales if few else None]


def _layout(matrix: FrozenLinear) -> tuple[int, int]:
    """The number of its layout, and the number of rows up to which its 4-bit copy is used (0 without a copy)."""
    return LAYOUTS.index(matrix.layout), matrix.few.most if matrix.few else 0
