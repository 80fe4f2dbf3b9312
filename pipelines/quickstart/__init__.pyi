from .stage import run_quickstart

__all__ = ["run_quickstart"]
