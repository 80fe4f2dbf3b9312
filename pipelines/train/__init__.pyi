from .stage import run_train

__all__ = ["run_train"]
