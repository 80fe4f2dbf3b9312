from .stage import run_datacard

__all__ = ["run_datacard"]
