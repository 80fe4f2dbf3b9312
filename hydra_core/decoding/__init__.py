"""Decoding: the naive loop that is the reference, and the engine that must equal it."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
