from .stage import run_promote

__all__ = ["run_promote"]
