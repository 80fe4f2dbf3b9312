from .stage import run_generate

__all__ = ["run_generate"]
