"""The settings of vLLM, for `engine: vllm`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipelines.config.section import Section


class VllmSection(Section):
    """How vLLM runs the base: base.context_limit is its max_model_len, the stage's max_batch_size its max_num_seqs."""

    tensor_parallel_size: int | None = Field(
        None, ge=1, description="GPUs of one node that share each copy of the base; default: those that a worker reserves "
                                "(serve.workers.gpus, distill.workers.gpus)")
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="share of each GPU's memory for weights, keys and values; default: vLLM's own")
    kv_cache_gib: float | None = Field(
        None, gt=0, description="GiB for keys and values on each GPU, or on a CPU; default: what gpu_memory_utilization leaves, "
                                "on a CPU 4")
    enforce_eager: bool | None = Field(None, description="neither compile nor record graphs; default: only on a CPU")
    num_speculative_tokens: int | None = Field(
        None, ge=1, description="tokens that heads draft in a step; default: one for each head")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="further engine arguments by vLLM's own names, as {block_size: 32}")
    any_version: bool = Field(False, description="run versions of vLLM that nobody has tried, too")
