from .stage import run_bench

__all__ = ["run_bench"]
