"""MLflow: runs, metrics, artifacts, the model registry. No other package imports MLflow."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
