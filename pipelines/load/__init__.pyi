from .stage import run_load

__all__ = ["run_load"]
