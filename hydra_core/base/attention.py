"""Attention over a KV cache and rotary positions, for the fused base and for the prefix layer of draft heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_core.base.kv_cache import AttentionMetadata, KVCache


class Rotary:
    """Rotary position tables of the base (RoPE, arXiv 2104.09864): cos and sin [P, d] in the working dtype.

    The tables grow when a later position is first needed, or by `reserve`. They are kept, since computing sines and cosines in
    every step takes far longer. `inverse_frequencies`: [d / 2] float32; `scaling`: a factor of both tables (transformers calls
    it `attention_scaling`).
    """

    def __init__(self, inverse_frequencies: Tensor, scaling: float, dtype: torch.dtype) -> None:
        self.inverse_frequencies, self.scaling, self.dtype = inverse_frequencies.float(), scaling, dtype
        self.cos = self.sin = torch.empty(0, 2 * len(inverse_frequencies), dtype=dtype)
        self.reserve(1024)

    def reserve(self, positions: int) -> None:
        """Grow the tables to `positions` rows now, so that no step has to."""
        if positions > len(self.cos):
            self._grow(positions)

    @torch.inference_mode(False)  # a table made in inference mode could not be used in a training step
    def _grow(self, positions: int) -> None:
        angles = torch.arange(positions, device=self.inverse_frequencies.device).float()[:, None]
        angles = (angles * self.inverse_frequencies).repeat(1, 2)
        self.cos = (angles.cos() * self.scaling).to(self.dtype)
        self.sin = (angles.sin() * self.scaling).to(self.dtype)

    def at(self, positions: Tensor, below: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [B, N, 1, d] at `positions` [B, N].

        `below`: an upper bound that all positions are below, if the caller knows one; otherwise the largest is read from the
        device.
        """
        needed = int(positions.max()) + 1 if below is None else below
        if needed > len(self.cos):
            self._grow(2 * needed)
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to [B, N, heads, d]."""
    low, high = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-high, low), dim=-1) * sin


def grouped_mask(mask: Tensor | None, groups: int) -> Tensor | None:
    """Repeat an additive mask [B, 1, N, S] for queries folded as [B, H, groups * N, d]."""
    return mask if mask is None or groups == 1 else mask.repeat(1, 1, groups, 1)


def grouped_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Grouped-query attention without copying keys for each query head.

    `queries`: [B, N, Hq, d]; `keys`, `values`: [B, H, S, d]; `mask`: additive [B, 1, (Hq / H) * N, S] from
    `grouped_mask`. The query heads that share a key head are folded into the token dimension. Returns [B, N, Hq * d].
    """
    batch, nodes, heads, width = queries.shape
    groups = heads // keys.shape[1]
    folded = queries.view(batch, nodes, keys.shape[1], groups, width).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(batch, keys.shape[1], groups * nodes, width)
    return folded_attention(folded, keys, values, mask, nodes, scale)


def folded_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, nodes: int, scale: float) -> Tensor:
    """As `grouped_attention`, of queries that are folded already: [B, H, G * N, d] with G = Hq / H. Returns [B, N, Hq * d]."""
    batch, kv_heads, folded, width = queries.shape
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    mixed = mixed.view(batch, kv_heads, folded // nodes, nodes, width).permute(0, 3, 1, 2, 4)
    return mixed.reshape(batch, nodes, kv_heads * (folded // nodes) * width)


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of each query and key head before its rotation (Qwen3): weights [d]."""

    query: Tensor
    key: Tensor
    eps: float

    def __call__(self, states: Tensor, heads: int) -> Tensor:
        """Normalise `states` [B, N, Hq + H, d], in which the Hq = `heads` query heads come first."""
        shape = (states.shape[-1],)
        return torch.cat((F.rms_norm(states[:, :, :heads], shape, self.query, self.eps),
                          F.rms_norm(states[:, :, heads:], shape, self.key, self.eps)), dim=2)


def cached_attention(qkv: Tensor, heads: int, cache: KVCache, layer: int, metadata: AttentionMetadata, cos: Tensor, sin: Tensor,
                     mask: Tensor | None, norms: HeadNorms | None = None) -> Tensor:
    """Normalise and rotate heads, write keys and values to the cache, and attend.

    `qkv`: [B, N, (Hq + 2 H) * d]; `mask`: from `grouped_mask`; `norms`: None for a model without them. Returns [B, N, Hq * d].
    """
    batch, nodes, _ = qkv.shape
    kv_heads, width = cache.keys.shape[3], cache.keys.shape[4]
    split = qkv.view(batch, nodes, heads + 2 * kv_heads, width)
    states = split[:, :, :heads + kv_heads]
    rotated = rotate(states if norms is None else norms(states, heads), cos, sin)
    keys, values = cache.write(layer, metadata, rotated[:, :, heads:], split[:, :, heads + kv_heads:])
    return grouped_attention(rotated[:, :, :heads], keys, values, mask, width ** -0.5)
