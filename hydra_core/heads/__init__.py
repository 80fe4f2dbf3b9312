"""Draft heads: what is trained. One file a kind, shared parts beside them, put together in `registry`."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
