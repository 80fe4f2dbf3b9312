from .stage import run_distill

__all__ = ["run_distill"]
