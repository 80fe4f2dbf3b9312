from .embedded import EMBEDDED_BASE
from .kv_cache import AttentionMetadata, KVCache
from .load import context_limit, formats_of, hidden_width, load_base, load_vocabulary, load_weightless, pick_device, quantisation
from .model import Base
from .resolve import resolve_base
from .text import encode_prompt, load_tokenizer, user_turn_opening
from .text_base import TextBase, WeightlessBase
from .vocabulary import BaseIdentity, BaseVocabulary, VocabHead

__all__ = [
           "EMBEDDED_BASE",
           "AttentionMetadata",
           "Base",
           "BaseIdentity",
           "BaseVocabulary",
           "KVCache",
           "TextBase",
           "VocabHead",
           "WeightlessBase",
           "context_limit",
           "encode_prompt",
           "formats_of",
           "hidden_width",
           "load_base",
           "load_tokenizer",
           "load_vocabulary",
           "load_weightless",
           "pick_device",
           "quantisation",
           "resolve_base",
           "user_turn_opening",
]
