"""What a stage takes where vLLM runs the base: its weights, and the keys and values it is given; it decides the rest itself."""

from __future__ import annotations

from dataclasses import replace

from hydra_core.interop.vllm_engine import CPU_CACHE_GIB
from pipelines.config import RunConfig
from pipelines.sizing.amounts import Range, StageSize
from pipelines.sizing.base import BaseShape
from pipelines.sizing.engines import loading
from pipelines.sizing.processes import cuda_context, process

ANSWERING = ("distill", "serve", "batch", "load")
"""Stages whose answers are written by what `engine` names."""
PACE = "vLLM decides how fast it answers"


def in_vllm(config: RunConfig, size: StageSize, base: BaseShape, gpu: bool) -> StageSize:
    """`size`, an estimate of our own engine, with what vLLM takes in its place."""
    if config.engine == "own" or size.name not in ANSWERING or (size.name == "batch" and config.batch.address):
        return size
    section, gpus = config.vllm, (config.distill if size.name == "distill" else config.serve).workers.gpus
    if size.name == "distill":  # the base's own forward computes hidden states afterwards
        note = "memory is that of the forward that computes hidden states, on one device; vLLM, which answers, has to fit too"
        return replace(size, seconds=None, by=PACE, notes=(*size.notes, note))
    ranks = section.tensor_parallel_size or max(1, int(gpus))
    cache = section.kv_cache_gib if section.kv_cache_gib is not None or gpu else CPU_CACHE_GIB
    parts = {"weights": Range.of(base.weight_bytes() / ranks)}
    if cache is not None:
        parts["keys and values"] = Range.of(cache * 2**30)
    fills = "" if cache is not None else "; keys and values fill what vllm.gpu_memory_utilization leaves of each GPU"
    note = f"in vLLM, the base shared out among {ranks} GPU{'s' if ranks > 1 else ''}{fills}" if gpu else "in vLLM"
    placed = ({"process": cuda_context(), **parts}, {"process": process(True), **loading(base)}) if gpu else (
        {}, {"process": process(False), **parts})
    kept = tuple(text for text in size.notes if "tokens/s" not in text)
    return replace(size, device=placed[0], memory=placed[1], seconds=None, by=PACE, notes=(*kept, note))
