from .stage import run_compare

__all__ = ["run_compare"]
