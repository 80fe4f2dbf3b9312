"""Requests with their sampling settings, and the choice of the next token."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
