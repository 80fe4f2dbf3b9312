from .stage import batch_finished, run_batch

__all__ = ["batch_finished", "run_batch"]
