"""The prefix layer of Hydra++: one causal decoder layer over the base's hidden states, with a KV cache of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra_core.base.attention import Rotary, cached_attention, grouped_attention, grouped_mask, rotate
from hydra_core.base.kv_cache import AttentionMetadata, KVCache
from hydra_core.base.layer import LayerWeights
from hydra_core.base.linear import Packable, PackableLinear, packable
from hydra_core.base.native import is_native, native_decoder, real_tokens, run_natively


class PrefixLayer(Packable):
    """A Llama decoder layer in the base's own shape, then an RMSNorm.

    The projections back into the residual start at zero, so the layer starts as the normalised hidden state and training only
    adds to it.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.query_heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.query_heads
        self.head_width = getattr(config, "head_dim", None) or width // self.query_heads
        inner = getattr(config, "intermediate_size", None) or 4 * width
        self.eps = eps = getattr(config, "rms_norm_eps", 1e-5)
        self.input_norm = nn.RMSNorm(width, eps=eps)
        self.qkv = PackableLinear(width, (self.query_heads + 2 * self.kv_heads) * self.head_width, bias=False)
        self.output = PackableLinear(self.query_heads * self.head_width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=eps)
        self.gate_up = PackableLinear(width, 2 * inner, bias=False)
        self.down = PackableLinear(inner, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=eps)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.down.weight)
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta") or 10000.0
        steps = torch.arange(0, self.head_width, 2, dtype=torch.float32, device="cpu") / self.head_width
        self.frequencies = 1.0 / theta ** steps
        self._rotary: Rotary | None = None

    def _rotary_like(self, like: Tensor) -> Rotary:
        if self._rotary is None or self._rotary.dtype != like.dtype or self._rotary.cos.device != like.device:
            self._rotary = Rotary(self.frequencies.to(like.device), 1.0, like.dtype)
        return self._rotary

    @property
    def tables(self) -> tuple[Tensor, ...]:
        """cos and sin of the positions so far, the tensors that `Rotary` holds."""
        return () if self._rotary is None else (self._rotary.cos, self._rotary.sin)

    def forward(self, hidden: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Teacher-forced: `hidden` [B, T, D], `positions` [B, T] int64, `mask` [B, 1, T, T] bool; returns [B, T, D].

        With `wanted` [B, T] bool the other positions are zeros: for a prompt, which is only attended to, keys and values are
        enough.
        """
        qkv = self.qkv(self.input_norm(hidden))
        batch, tokens, _ = qkv.shape
        split = qkv.view(batch, tokens, self.query_heads + 2 * self.kv_heads, self.head_width)
        cos, sin = self._rotary_like(qkv).at(positions)
        rotated = rotate(split[:, :, :self.query_heads + self.kv_heads], cos, sin)
        keys = rotated[:, :, self.query_heads:].transpose(1, 2)
        values = split[:, :, self.query_heads + self.kv_heads:].transpose(1, 2)
        queries, groups, scale = rotated[:, :, :self.query_heads], self.query_heads // self.kv_heads, self.head_width ** -0.5
        if wanted is None:
            return self._finish(hidden, grouped_attention(queries, keys, values, mask.repeat(1, 1, groups, 1), scale))
        columns, real = _wanted_first(wanted)
        line = torch.arange(batch, device=columns.device)[:, None]
        rows_mask = mask[:, 0][line, columns][:, None].repeat(1, 1, groups, 1)
        mixed = grouped_attention(queries[line, columns], keys, values, rows_mask, scale)
        made = self._finish(hidden[wanted], mixed[real])
        return torch.zeros_like(hidden).masked_scatter(wanted[..., None], made)

    def pack(self) -> None:
        """Pack the weights for decoding and compile the step, where this machine can do either."""
        if not packable(self.qkv.weight):
            return
        matrices = [self.qkv, self.output, self.gate_up, self.down]
        for matrix in matrices:
            matrix.pack()
        qkv, output, gate_up, down = [matrix._packed for matrix in matrices]
        layer = LayerWeights(self.input_norm.weight.detach().float(), qkv, None, output, self.mlp_norm.weight.detach().float(),
                             gate_up, down)
        self._packed = native_decoder([layer], self.query_heads, self.kv_heads, self.head_width, self.eps)

    def step(self, hidden: Tensor, cache: KVCache, step: AttentionMetadata, counts: Tensor | None = None) -> Tensor:
        """While decoding: [B, N, D] from newly committed hidden states [B, N, D], the first `counts` [B] of each row; writes
        their keys and values to the cache."""
        cos, sin = self._rotary_like(hidden).at(step.positions, step.kv_len)
        if self._packed is not None and is_native(real_tokens(hidden.shape, counts), hidden.dtype) and not step.fixed:
            residual, _ = run_natively(self._packed, hidden.float(), cache, step, cos, sin, counts)
            ended: Tensor = self.norm(residual.to(hidden.dtype))
            return ended
        qkv = self.qkv(self.input_norm(hidden))
        mask = grouped_mask(step.mask, self.query_heads // self.kv_heads)
        return self._finish(hidden, cached_attention(qkv, self.query_heads, cache, 0, step, cos, sin, mask))

    def _finish(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        ended: Tensor = self.norm(self._added(hidden, mixed))
        return ended

    def _added(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream [..., D] after attention's output `mixed` and the MLP."""
        hidden = hidden + self.output(mixed)
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        added: Tensor = hidden + self.down(F.silu(gate) * up)
        return added

    def cache_bytes(self, rows: int, slots: int) -> int:
        """Bytes that `allocate` takes."""
        return KVCache.bytes_for(1, rows, slots, self.kv_heads, self.head_width, self.qkv.weight.dtype)

    def allocate(self, rows: int, slots: int) -> KVCache:
        """A one-layer cache in this layer's dtype and on its device."""
        weight = self.qkv.weight
        self._rotary_like(weight).reserve(slots)
        return KVCache(1, rows, slots, self.kv_heads, self.head_width, weight.dtype, weight.device)


def _wanted_first(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The wanted columns of every row, first [B, Q] int64, and which of these are wanted [B, Q] bool: a row with fewer than Q
    wanted columns is filled with others."""
    most = max(1, int(wanted.sum(1).max()))
    columns = wanted.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return columns, wanted.gather(1, columns)
