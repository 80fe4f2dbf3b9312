"""Proposers draft while decoding: with heads, with text copied from the context, with both in a dynamic tree, or not at all."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
