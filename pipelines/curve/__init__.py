"""`curve`: held-out tokens per step over the number of training rows, and what more rows would bring."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
