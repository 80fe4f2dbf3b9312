"""A Llama decoder as few, large operations: q/k/v in one matmul, gate/up in one, grouped attention, preallocated KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_core.base.attention import Rotary, cached_attention, grouped_mask
from hydra_core.base.kv_cache import KVCache, Step

FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; matrices are [out, in], norms [D]."""

    input_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class FusedDecoder:
    """Llama forward over a `KVCache`, built from a loaded transformers model (whose weights it takes over)."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps = config.rms_norm_eps
        self.embedding = model.model.embed_tokens.weight.detach()
        self.final_norm = model.model.norm.weight.detach()
        self.layers = [_take_weights(layer) for layer in model.model.layers]
        rotary = model.model.rotary_emb
        self.rotary = Rotary(rotary.inv_freq, rotary.attention_scaling, self.embedding.dtype)

    @staticmethod
    def reason_unsupported(config: Any) -> str | None:
        """Why this decoder cannot run a model of `config`, or None."""
        if config.model_type != "llama":
            return f"model type {config.model_type}"
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            return "biased projections"
        if config.hidden_act != "silu":
            return f"activation {config.hidden_act}"
        rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        return None if rope_type in FIXED_ROPE_TYPES else f"rope type {rope_type}"

    def allocate(self, rows: int, slots: int) -> KVCache:
        return KVCache(len(self.layers), rows, slots, self.kv_heads, self.head_width, self.embedding.dtype,
                       self.embedding.device)

    def __call__(self, ids: Tensor, cache: KVCache, step: Step) -> Tensor:
        """Token ids [B, N] to hidden states after the final norm [B, N, D]; writes the nodes' keys and values."""
        width = self.embedding.shape[1]
        cos, sin = self.rotary.at(step.positions)
        mask = grouped_mask(step.mask, self.heads // self.kv_heads)
        hidden = F.embedding(ids, self.embedding)
        for index, layer in enumerate(self.layers):
            normed = F.rms_norm(hidden, (width,), layer.input_norm, self.eps)
            mixed = cached_attention(F.linear(normed, layer.qkv), self.heads, cache, index, step, cos, sin, mask)
            hidden = hidden + F.linear(mixed, layer.output)
            normed = F.rms_norm(hidden, (width,), layer.mlp_norm, self.eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down)
        return F.rms_norm(hidden, (width,), self.final_norm, self.eps)


def _take_weights(layer: Any) -> LayerWeights:
    """Join a transformers layer's matrices, letting go of the originals as it reads them."""
    attention, mlp = layer.self_attn, layer.mlp
    weights = LayerWeights(
        input_norm=layer.input_layernorm.weight.detach(),
        qkv=torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach(),
        output=attention.o_proj.weight.detach(),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach(),
        down=mlp.down_proj.weight.detach(),
    )
    for module in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        module.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    return weights
