from .stage import run_loop

__all__ = ["run_loop"]
