from .stage import run_ablate

__all__ = ["run_ablate"]
