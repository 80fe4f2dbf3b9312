"""Triton kernels for the operations between a decoder's matrix products on a GPU: residual add with RMSNorm, rotary
positions with the write to the KV cache, and SiLU with the product by the gate.

As single PyTorch operators these take some twenty launches per layer, each with a few microseconds of work: for the few
tokens of a decoding step they take as long as the matrix products themselves. Three kernels do the same work, with
intermediate values in float32.

    B sequences, N nodes per sequence, D width, I inner width of the MLP, Hq query heads, H key/value heads, G = Hq / H,
    d head width, S slots of the KV cache
"""
# mypy: disable-error-code="no-untyped-def"
# the arguments of a Triton kernel are addresses and numbers, for which there are no types

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING or importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
else:  # PyTorch's CPU build does not install Triton
    triton = tl = None

MAX_WIDTH = 16384
"""Largest D: one program holds a whole line of the residual."""


def reason_unavailable(device: torch.device, dtype: torch.dtype, width: int, head_width: int) -> str | None:
    """Why these kernels cannot replace PyTorch's operators for a model of D `width`, or None if they can."""
    if device.type != "cuda":
        return f"device {device.type}"
    if triton is None:
        return "Triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"dtype {dtype}"
    if width > MAX_WIDTH or head_width & (head_width - 1) or head_width < 4:
        return f"width {width}, head width {head_width}"
    return None


if triton is not None:

    @triton.jit
    def _fused_add_rms_norm(residual, added, weight, normed, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        values = tl.load(residual + row * width + column, mask=inside, other=0.0)
        if ADDS:
            values += tl.load(added + row * width + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(residual + row * width + column, values, mask=inside)
        scale = 1.0 / tl.sqrt(tl.sum(values * values) / width + eps)
        values = values * scale * tl.load(weight + column, mask=inside, other=0.0)
        tl.store(normed + row * width + column, values.to(normed.dtype.element_ty), mask=inside)

    @triton.jit
    def _silu_and_mul(gate_up, gated, inner, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < inner
        gate = tl.load(gate_up + row * 2 * inner + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * 2 * inner + inner + column, mask=inside, other=0.0).to(tl.float32)
        product = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(gated + row * inner + column, product.to(gated.dtype.element_ty), mask=inside)

    @triton.jit
    def _rope_and_cache(qkv, cos, sin, slots, query_norm, key_norm, queries, keys, values, nodes, row_stride, slot_stride, eps,
                        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, NORMS: tl.constexpr):
        token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        row, node = token // nodes, token % nodes
        HALF: tl.constexpr = WIDTH // 2
        GROUPS: tl.constexpr = HEADS // KV_HEADS
        column = tl.arange(0, HALF)
        source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * WIDTH
        low, high = tl.load(source + column).to(tl.float32), tl.load(source + HALF + column).to(tl.float32)
        stored = row * row_stride + tl.load(slots + token) * slot_stride
        if head >= HEADS + KV_HEADS:
            target = values + stored + (head - HEADS - KV_HEADS) * WIDTH
        else:
            if NORMS:
                weight = query_norm if head < HEADS else key_norm
                scale = 1.0 / tl.sqrt((tl.sum(low * low) + tl.sum(high * high)) / WIDTH + eps)
                low = low * scale * tl.load(weight + column).to(tl.float32)
                high = high * scale * tl.load(weight + HALF + column).to(tl.float32)
            at = token * WIDTH + column
            rotated_low = low * tl.load(cos + at).to(tl.float32) - high * tl.load(sin + at).to(tl.float32)
            high = high * tl.load(cos + at + HALF).to(tl.float32) + low * tl.load(sin + at + HALF).to(tl.float32)
            low = rotated_low
            if head < HEADS:
                target = queries + (((row * KV_HEADS + head // GROUPS) * GROUPS + head % GROUPS) * nodes + node) * WIDTH
            else:
                target = keys + stored + (head - HEADS) * WIDTH
        tl.store(target + column, low.to(queries.dtype.element_ty))
        tl.store(target + HALF + column, high.to(queries.dtype.element_ty))


def fused_add_rms_norm(residual: Tensor, added: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Add `added` [..., D], if given, to `residual` [..., D] float32 in place; return the sum's RMSNorm in `dtype`.

    `weight`: [D] float32.
    """
    width = residual.shape[-1]
    normed = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    _fused_add_rms_norm[(residual.numel() // width,)](
        residual, residual if added is None else added, weight, normed, width, eps,
        ADDS=added is not None, BLOCK=triton.next_power_of_2(width))
    return normed


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up: [..., 2 I] to [..., I]."""
    inner = gate_up.shape[-1] // 2
    gated = torch.empty((*gate_up.shape[:-1], inner), dtype=gate_up.dtype, device=gate_up.device)
    _silu_and_mul[(gate_up.numel() // (2 * inner), triton.cdiv(inner, 1024))](gate_up, gated, inner, BLOCK=1024)
    return gated


def rope_and_cache(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor, heads: int,
                   query_norm: Tensor | None = None, key_norm: Tensor | None = None, norm_eps: float = 0.0) -> Tensor:
    """Apply rotary positions to queries and keys, and write keys and values to one layer's KV cache.

    `qkv`: [B, N, (Hq + 2 H) * d]; `cos`, `sin`: [B, N, 1, d]; `slots`: [B, N] int64, where the nodes' keys and values go;
    `keys`, `values`: [B, S, H, d], changed in place; `heads`: Hq; `query_norm`, `key_norm`: [d], weights of an RMSNorm of each
    head before its rotation (Qwen3), both or neither. Returns the queries [B, H, G * N, d].
    """
    batch, nodes, _ = qkv.shape
    kv_heads, width = keys.shape[2:]
    queries = torch.empty(batch, kv_heads, heads // kv_heads * nodes, width, dtype=qkv.dtype, device=qkv.device)
    normed = query_norm is not None and key_norm is not None
    _rope_and_cache[(batch * nodes, heads + 2 * kv_heads)](
        qkv, cos, sin, slots, query_norm if normed else qkv, key_norm if normed else qkv, queries, keys, values, nodes,
        keys.stride(0), keys.stride(1), norm_eps, HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, NORMS=normed, num_warps=1)
    return queries
