"""Any other causal model made of attention alone: transformers runs it, with this project's cache and tree mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hydra_core.base.config_values import CACHED_SHAPES, config_value, layers_differ, longrope_limit
from hydra_core.base.kv_cache import AttentionMetadata, KVCache
from hydra_core.base.probe import decoder_of
from hydra_core.base.taps import with_taps

ALIBI = ("bloom", "mpt")
"""Model types that derive positions from a two-dimensional attention mask."""
OWN_MASKS = ("gpt_neo",)
"""Model types with a mask of their own over the slots of the cache: the last slot is taken for the newest token of every row, and
the window of local layers is counted from there, which neither a tree nor a shorter row can bear."""
FULL, SLIDING = "full_attention", "sliding_attention"


class _StepLayer(CacheLayerMixin):
    """One layer of a `KVCache` behind transformers' cache interface, for one step."""

    def __init__(self, cache: KVCache, layer: int, metadata: AttentionMetadata) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.layer, self.metadata = cache, layer, metadata
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the `KVCache` is allocated already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.write(self.layer, self.metadata, key_states.transpose(1, 2), value_states.transpose(1, 2))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.metadata.kv_len, 0

    def get_seq_length(self) -> int:
        return self.metadata.kv_len - self.metadata.slots.shape[1]

    def get_max_length(self) -> int:
        return self.cache.slots


class TransformersDecoder:
    """The transformers model behind the interface of `Decoder`: slower than the fused one, but for every architecture.

    Layers with a sliding window keep all keys, and a mask hides those outside the window. `limit`: tokens of prompt and answer,
    if fewer than the model's own.
    """

    supports_tree = True
    ragged = False

    def __init__(self, model: Any, limit: int | None = None) -> None:
        config = model.config.get_text_config()
        self.model = decoder_of(model)
        self.embedding = model.get_input_embeddings().weight.detach()
        self.layers = config.num_hidden_layers
        self.kv_heads = config_value(config, "num_key_value_heads", "num_attention_heads")
        self.head_width = config_value(config, "head_dim") or config.hidden_size // config.num_attention_heads
        own = config_value(config, "max_position_embeddings")
        self.most_positions = min(filter(None, (own, limit)), default=None)
        self.kinds = set(getattr(config, "layer_types", None) or ())
        self.window = _window(config)

    @staticmethod
    def reason_unsupported(config: Any, limit: int | None = None) -> str | None:
        """Why the cache of a model with `config` cannot hold a draft tree, or None if it can. `limit`: tokens of prompt and
        answer, if fewer than the model's own."""
        kinds = set(getattr(config, "layer_types", None) or [FULL])
        if not kinds <= {FULL, SLIDING}:
            return f"layers of kind {', '.join(sorted(kinds - {FULL, SLIDING}))}"
        if differing := layers_differ(config, CACHED_SHAPES):
            return f"layers that differ in {differing}"
        if getattr(config, "is_encoder_decoder", False):
            return "an encoder-decoder"
        if not config_value(config, "num_attention_heads"):
            return "no attention heads"
        if config_value(config, "mamba_d_state", "state_size"):
            return "a recurrent state"
        short = longrope_limit(config)
        if short is not None and (limit or config.max_position_embeddings) > short:
            return (f"rotary positions that change for all rows once one is longer than {short} tokens: "
                    f"base.context_limit={short} avoids that")
        if config_value(config, "kv_lora_rank"):
            return "keys and values that are stored as one latent vector (DeepSeek's attention)"
        if config.model_type in ALIBI or getattr(config, "alibi", False):
            return "positions derived from the attention mask"
        if config.model_type in OWN_MASKS:
            return "a mask of its own that counts slots of the cache"
        return None

    def allocate(self, rows: int, slots: int) -> KVCache:
        return KVCache(self.layers, rows, slots, self.kv_heads, self.head_width, self.embedding.dtype,
                       self.embedding.device)

    def cache_bytes(self, rows: int, slots: int) -> int:
        return KVCache.bytes_for(self.layers, rows, slots, self.kv_heads, self.head_width, self.embedding.dtype)

    def __call__(self, ids: Tensor, cache: KVCache, metadata: AttentionMetadata, counts: Tensor | None = None,
                 taps: Sequence[int] = ()) -> Tensor:
        """As `Decoder.__call__`."""
        layers: list[Any] = [_StepLayer(cache, layer, metadata) for layer in range(self.layers)]
        positions = metadata.positions
        if self.most_positions:  # draft nodes past the limit are never accepted; this keeps them inside a learned table
            positions = positions.clamp(max=self.most_positions - 1)
        output = self.model(input_ids=ids, attention_mask=self._masks(cache, metadata), position_ids=positions,
                            past_key_values=Cache(layers=layers), use_cache=True, output_hidden_states=bool(taps))
        return with_taps(output.last_hidden_state, [output.hidden_states[tap] for tap in taps])

    def _masks(self, cache: KVCache, metadata: AttentionMetadata) -> Tensor | dict[str, Tensor]:
        """The additive masks for transformers. It uses four-dimensional masks unchanged; without them it would build its own."""
        full = metadata.mask
        if full is None:
            batch, nodes = metadata.slots.shape
            full = torch.zeros(batch, 1, nodes, metadata.kv_len, dtype=cache.dtype, device=metadata.slots.device)
        if self.window is None:
            return full
        sliding = metadata.windowed(self.window).to(cache.dtype)
        return {FULL: full, SLIDING: sliding} if self.kinds else sliding


def _window(config: Any) -> int | None:
    """The window of layers with a sliding window, in tokens, or None when there is no such layer."""
    kinds = getattr(config, "layer_types", None)
    slides = SLIDING in kinds if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    return int(window) if window and slides else None
