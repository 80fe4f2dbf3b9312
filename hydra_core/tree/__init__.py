"""Draft trees: their shape, the cost of a decoding step, and the search for the tree that decodes fastest."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
