"""`loop`: an endpoint's own traffic becomes rows, better heads, and the next champion."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
