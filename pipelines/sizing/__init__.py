"""What a stage takes: memory, storage, network and time, computed from the settings before anything runs."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
