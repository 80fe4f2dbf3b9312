"""The frozen base model: loading, the fused forward and its fallback, the KV cache."""

from hydra_core.base.embedded import EMBEDDED_BASE
from hydra_core.base.kv_cache import KVCache, Step
from hydra_core.base.load import context_limit, formats_of, hidden_width, load_base, load_vocabulary, pick_device
from hydra_core.base.model import Base
from hydra_core.base.resolve import resolve_base
from hydra_core.base.text import encode_prompt, load_tokenizer, user_turn_opening
from hydra_core.base.vocabulary import BaseIdentity, BaseVocabulary, VocabHead

__all__ = ["EMBEDDED_BASE", "Base", "BaseIdentity", "BaseVocabulary", "KVCache", "Step", "VocabHead", "context_limit",
           "encode_prompt", "formats_of", "hidden_width", "load_base", "load_tokenizer", "load_vocabulary", "pick_device",
           "resolve_base", "user_turn_opening"]
