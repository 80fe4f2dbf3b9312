"""What a process takes before it holds anything of a model."""

from __future__ import annotations

from pipelines.sizing.amounts import Range

GIB = 2**30
STARTING = Range(5, 60)
"""Seconds in which Ray, its workers and what they import start."""
READING = (5e9, 0.3e9)
"""Bytes a second at which weights are read."""


def process(gpu: bool) -> Range:
    """Memory of a Python process with torch, Ray and what a stage imports; with a GPU also CUDA's libraries."""
    return Range(0.4 * GIB, 3.5 * GIB) if gpu else Range(0.3 * GIB, 1.2 * GIB)


def cuda_context() -> Range:
    """What CUDA keeps on a GPU for a process."""
    return Range(0.3 * GIB, 0.8 * GIB)


def starting(weights: int) -> Range:
    """Seconds until workers that load so many bytes of weights can begin."""
    return STARTING + Range(weights / READING[0], weights / READING[1])


def sharing(gpus: float) -> int:
    """Workers that share a GPU, where each reserves `gpus` of one."""
    return max(1, int(1 / gpus)) if 0 < gpus < 1 else 1
