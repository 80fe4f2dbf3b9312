from .stage import run_tree

__all__ = ["run_tree"]
