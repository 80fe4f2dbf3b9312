"""Any other attention-only causal model: transformers runs it, over our cache and our tree mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hydra_core.base.kv_cache import KVCache, Step


class _StepLayer(CacheLayerMixin):
    """One layer of a `KVCache` seen through transformers' cache interface, for the length of one step."""

    def __init__(self, cache: KVCache, layer: int, step: Step) -> None:
        super().__init__()
        self.cache, self.layer, self.step = cache, layer, step
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the storage stands already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.write(self.layer, self.step, key_states.transpose(1, 2), value_states.transpose(1, 2))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.step.span, 0

    def get_seq_length(self) -> int:
        return self.step.span - self.step.slots.shape[1]

    def get_max_length(self) -> int:
        return self.cache.slots


class TransformersDecoder:
    """The transformers model itself behind the fused decoder's interface: slower, but it knows every architecture."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model = model.get_decoder()
        self.embedding = model.get_input_embeddings().weight.detach()
        self.layers = config.num_hidden_layers
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @staticmethod
    def reason_unsupported(config: Any) -> str | None:
        """Why a model of `config` cannot hold a branching tree in its cache, or None."""
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            return f"layers of kind {', '.join(sorted(kinds - {'full_attention'}))}"
        if getattr(config, "is_encoder_decoder", False):
            return "an encoder-decoder"
        if not getattr(config, "num_attention_heads", None):
            return "no attention heads"
        return None

    def allocate(self, rows: int, slots: int) -> KVCache:
        return KVCache(self.layers, rows, slots, self.kv_heads, self.head_width, self.embedding.dtype,
                       self.embedding.device)

    def __call__(self, ids: Tensor, cache: KVCache, step: Step) -> Tensor:
        """As `FusedDecoder.__call__`."""
        mask = step.mask
        if mask is None:  # a four-dimensional mask is taken as it is; without one transformers would build its own
            mask = torch.zeros(ids.shape[0], 1, ids.shape[1], step.span, dtype=cache.dtype, device=ids.device)
        layers: list[Any] = [_StepLayer(cache, layer, step) for layer in range(self.layers)]
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=step.positions,
                            past_key_values=Cache(layers=layers), use_cache=True)
        return output.last_hidden_state
