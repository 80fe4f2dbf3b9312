"""A Llama-type decoder in few, large operations: one matmul for q/k/v, one for gate/up, grouped attention, preallocated KV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_core.base.attention import HeadNorms, Rotary, cached_attention, folded_attention, grouped_mask
from hydra_core.base.config_values import config_value, layers_differ
from hydra_core.base.kv_cache import AttentionMetadata, KVCache
from hydra_core.base.layer import LayerWeights
from hydra_core.base.linear import FrozenLinear
from hydra_core.base.native import is_native, native_decoder, real_tokens, run_natively
from hydra_core.base.q4_1 import Q4Matrix
from hydra_core.base.taps import with_taps
from hydra_core.kernels.triton import fused_add_rms_norm, reason_unavailable, rope_and_cache, silu_and_mul

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class FusedDecoder:
    """Forward of the Llama family over a `KVCache`, built from a loaded transformers model, whose weights it takes over.

    `codes`: tensor name -> 4-bit codes of the layers' matrices, if products are to use them; `native`: whether compiled kernels
    may be used: whole steps in C++ on a CPU, Triton kernels between the matrix products on a GPU.
    """

    supports_tree = True

    def __init__(self, model: Any, codes: Mapping[str, Q4Matrix] | None = None, native: bool = False) -> None:
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.embedding = model.model.embed_tokens.weight.detach()
        # the residual is kept in float32: in bf16 its few large values would absorb what the layers add
        self.residual_dtype = torch.promote_types(self.embedding.dtype, torch.float32)
        self.final_norm = model.model.norm.weight.detach().to(self.residual_dtype)
        self.layers = [_take_weights(layer, f"model.layers.{number}", codes, self.residual_dtype)
                       for number, layer in enumerate(model.model.layers)]
        rotary = model.model.rotary_emb
        self.rotary = Rotary(rotary.inv_freq, rotary.attention_scaling, self.embedding.dtype)
        self.native = native_decoder(self.layers, self.heads, self.kv_heads, self.head_width, self.eps) if native else None
        self.ragged = self.native is not None
        self.kernels = native and reason_unavailable(self.embedding.device, self.embedding.dtype, self.embedding.shape[1],
                                                     self.head_width) is None

    def without_kernels(self) -> bool:
        """Go on by PyTorch's operators alone; False if that is so already."""
        had = self.native is not None or self.kernels
        self.native, self.ragged, self.kernels = None, False, False
        return had

    @staticmethod
    def reason_unsupported(config: Any, limit: int | None = None) -> str | None:
        """Why this decoder cannot run a model of `config`, or None. `limit`: tokens of prompt and answer, if fewer than the
        model's own."""
        if config.model_type not in FAMILIES:
            return f"model type {config.model_type}"
        if config.hidden_act != "silu":
            return f"activation {config.hidden_act}"
        if differing := layers_differ(config):
            return f"layers that differ in {differing}"
        kinds = getattr(config, "layer_types", None)
        slides = set(kinds) != {"full_attention"} if kinds else getattr(config, "use_sliding_window", True)
        window = config_value(config, "sliding_window") if slides else None
        if window and window < (limit or config.max_position_embeddings):  # a longer one hides nothing
            return f"a sliding window of {window}"
        rope = config.rope_parameters or {}
        if (rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0) != 1.0:
            return "partial rotary positions"
        kind = rope.get("rope_type", "default")
        return None if kind in FIXED_ROPE_TYPES else f"rope type {kind}"

    def allocate(self, rows: int, slots: int) -> KVCache:
        self.rotary.reserve(slots)  # no step over this cache has to grow the tables, recorded or not
        return KVCache(len(self.layers), rows, slots, self.kv_heads, self.head_width, self.embedding.dtype,
                       self.embedding.device)

    def cache_bytes(self, rows: int, slots: int) -> int:
        return KVCache.bytes_for(len(self.layers), rows, slots, self.kv_heads, self.head_width, self.embedding.dtype)

    @property
    def bytes_read(self) -> int:
        """Bytes of the layers' matrices that a step with one node reads."""
        return sum(matrix.bytes_read for layer in self.layers for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down))

    def __call__(self, ids: Tensor, cache: KVCache, metadata: AttentionMetadata, counts: Tensor | None = None,
                 taps: Sequence[int] = ()) -> Tensor:
        """As `Decoder.__call__`."""
        width = self.embedding.shape[1]
        cos, sin = self.rotary.at(metadata.positions, metadata.kv_len)
        kind = self.embedding.dtype
        hidden = F.embedding(ids, self.embedding).to(self.residual_dtype)
        if self.native is not None and is_native(real_tokens(ids.shape, counts), kind) and not metadata.fixed:
            hidden, tapped = run_natively(self.native, hidden, cache, metadata, cos, sin, counts, taps)
        elif self.kernels:
            return self._by_kernels(hidden, cache, metadata, cos, sin, taps)
        else:
            entering = {}
            mask = grouped_mask(metadata.mask, self.heads // self.kv_heads)
            for index, layer in enumerate(self.layers):
                if index in taps:
                    entering[index] = hidden
                normed = F.rms_norm(hidden, (width,), layer.input_norm, self.eps).to(kind)
                mixed = cached_attention(layer.qkv(normed), self.heads, cache, index, metadata, cos, sin, mask, layer.head_norms)
                hidden = hidden + layer.output(mixed)
                normed = F.rms_norm(hidden, (width,), layer.mlp_norm, self.eps).to(kind)
                gate, up = layer.gate_up(normed).chunk(2, dim=-1)
                hidden = hidden + layer.down(F.silu(gate) * up)
            tapped = [entering[tap] for tap in taps]
        return with_taps(F.rms_norm(hidden, (width,), self.final_norm, self.eps).to(kind), tapped)

    def _by_kernels(self, hidden: Tensor, cache: KVCache, metadata: AttentionMetadata, cos: Tensor, sin: Tensor,
                    taps: Sequence[int]) -> Tensor:
        """The layers and the final norm on a GPU; `hidden` [B, N, D] float32 is changed in place."""
        kind, (first, last), added = self.embedding.dtype, metadata.rows, None
        entering: dict[int, Tensor] = {}
        mask = grouped_mask(metadata.mask, self.heads // self.kv_heads)
        for index, layer in enumerate(self.layers):
            normed = fused_add_rms_norm(hidden, added, layer.input_norm, self.eps, kind)
            if index in taps:  # the norm has added the layer before
                entering[index] = hidden.to(kind, copy=True)
            keys, values = cache.keys[index, first:last], cache.values[index, first:last]
            norms = layer.head_norms
            queries = rope_and_cache(layer.qkv(normed), cos, sin, metadata.slots, keys, values, self.heads,
                                     *(() if norms is None else (norms.query, norms.key, norms.eps)))
            seen_keys, seen_values = (store[:, :metadata.kv_len].transpose(1, 2) for store in (keys, values))
            mixed = folded_attention(queries, seen_keys, seen_values, mask, metadata.slots.shape[1], self.head_width ** -0.5)
            normed = fused_add_rms_norm(hidden, layer.output(mixed), layer.mlp_norm, self.eps, kind)
            added = layer.down(silu_and_mul(layer.gate_up(normed)))
        return with_taps(fused_add_rms_norm(hidden, added, self.final_norm, self.eps, kind), [entering[tap] for tap in taps])


def _take_weights(layer: Any, name: str, codes: Mapping[str, Q4Matrix] | None, residual_dtype: torch.dtype) -> LayerWeights:
    attention = layer.self_attn
    norms = None
    if getattr(attention, "q_norm", None) is not None:
        norms = HeadNorms(attention.q_norm.weight.detach(), attention.k_norm.weight.detach(),
                          attention.q_norm.variance_epsilon)

    def joined(part: str, *projections: str) -> FrozenLinear:
        modules = [getattr(getattr(layer, part), projection) for projection in projections]
        found = codes and Q4Matrix.joined([codes[f"{name}.{part}.{projection}.weight"] for projection in projections])
        return _joined(modules, found or None)

    return LayerWeights(
        input_norm=layer.input_layernorm.weight.detach().to(residual_dtype),
        qkv=joined("self_attn", "q_proj", "k_proj", "v_proj"),
        head_norms=norms,
        output=joined("self_attn", "o_proj"),
        mlp_norm=layer.post_attention_layernorm.weight.detach().to(residual_dtype),
        gate_up=joined("mlp", "gate_proj", "up_proj"),
        down=joined("mlp", "down_proj"),
    )


def _joined(modules: list[Any], codes: Q4Matrix | None) -> FrozenLinear:
    """Join several of transformers' linear layers into one; their own weights are freed, so nothing is held twice."""
    weight = torch.cat([module.weight for module in modules]).detach()
    bias = None
    if any(module.bias is not None for module in modules):
        bias = torch.cat([torch.zeros_like(module.weight[:, 0]) if module.bias is None else module.bias
                          for module in modules]).detach()
    for module in modules:
        module.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    return FrozenLinear.of(weight, bias, codes)
