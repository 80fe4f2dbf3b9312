"""Draft trees: their shape here, the search for the one that pays best beside it."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
