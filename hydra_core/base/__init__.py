"""The frozen base model: loading, the fused forward and its fallback, the KV cache."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
