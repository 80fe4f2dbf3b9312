"""`datacard`: what a run's rows are, and how well heads draft each kind of them."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
