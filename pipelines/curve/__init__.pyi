from .stage import run_curve

__all__ = ["run_curve"]
