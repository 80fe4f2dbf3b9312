"""Any other attention-only causal model: transformers runs it, over our cache and our tree mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hydra_core.base.kv_cache import KVCache, Step

ALIBI = ("bloom", "mpt")
"""Model types that know positions only by a mask of one dimension."""
FULL, SLIDING = "full_attention", "sliding_attention"


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
    """The transformers model itself behind the fused decoder's interface: slower, but it knows every architecture.

    Layers with a sliding window keep all keys and are masked instead, as a tree's nodes share slots with nobody.
    """

    supports_tree = True
    ragged = False

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        self.model = model.get_decoder()
        self.embedding = model.get_input_embeddings().weight.detach()
        self.layers = config.num_hidden_layers
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.most_positions = getattr(config, "max_position_embeddings", None)
        self.kinds = set(getattr(config, "layer_types", None) or ())
        self.window = _window(config)

    @staticmethod
    def reason_unsupported(config: Any) -> str | None:
        """Why a model of `config` cannot hold a branching tree in its cache, or None."""
        kinds = set(getattr(config, "layer_types", None) or [FULL])
        if not kinds <= {FULL, SLIDING}:
            return f"layers of kind {', '.join(sorted(kinds - {FULL, SLIDING}))}"
        if getattr(config, "is_encoder_decoder", False):
            return "an encoder-decoder"
        if not getattr(config, "num_attention_heads", None):
            return "no attention heads"
        if getattr(config, "mamba_d_state", None) or getattr(config, "state_size", None):
            return "a recurrent state"
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
            return "positions that are turned by the longest row's length"
        if getattr(config, "kv_lora_rank", None):
            return "keys and values kept as one latent (DeepSeek's attention)"
        if config.model_type in ALIBI or getattr(config, "alibi", False):
            return "positions read off the attention mask"
        return None

    def allocate(self, rows: int, slots: int) -> KVCache:
        return KVCache(self.layers, rows, slots, self.kv_heads, self.head_width, self.embedding.dtype,
                       self.embedding.device)

    def cache_bytes(self, rows: int, slots: int) -> int:
        return KVCache.bytes_for(self.layers, rows, slots, self.kv_heads, self.head_width, self.embedding.dtype)

    def __call__(self, ids: Tensor, cache: KVCache, step: Step, counts: Tensor | None = None) -> Tensor:
        """As `Decoder.__call__`."""
        layers: list[Any] = [_StepLayer(cache, layer, step) for layer in range(self.layers)]
        positions = step.positions
        if self.most_positions:  # draft nodes past the limit can never be kept, but a learned table ends there
            positions = positions.clamp(max=self.most_positions - 1)
        output = self.model(input_ids=ids, attention_mask=self._masks(cache, step), position_ids=positions,
                            past_key_values=Cache(layers=layers), use_cache=True)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _masks(self, cache: KVCache, step: Step) -> Tensor | dict[str, Tensor]:
        """A four-dimensional mask is taken as it is; without one transformers would build its own."""
        full = step.mask
        if full is None:
            batch, nodes = step.slots.shape
            full = torch.zeros(batch, 1, nodes, step.span, dtype=cache.dtype, device=step.slots.device)
        if self.window is None:
            return full
        sliding = step.windowed(self.window).to(cache.dtype)
        return {FULL: full, SLIDING: sliding} if self.kinds else sliding


def _window(config: Any) -> int | None:
    """Tokens a sliding layer looks back, or None when no layer slides."""
    kinds = getattr(config, "layer_types", None)
    slides = SLIDING in kinds if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    return int(window) if window and slides else None
