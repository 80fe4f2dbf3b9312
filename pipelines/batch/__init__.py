"""`batch`: offline generation over a file of prompts, resumable row by row."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
