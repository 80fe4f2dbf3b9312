"""Draft heads, the part that is trained: one file per kind, shared parts in `base`, the table of kinds in `registry`."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
