"""Settings that several stages share: the base, workers, tracking."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hydra_core.base.embedded import EMBEDDED_BASE
from pipelines.config.section import Section

if TYPE_CHECKING:
    from hydra_core.base import Base, WeightlessBase

log = logging.getLogger(__name__)


def reserved_device(device: str) -> str:
    """`device`, with `auto` as `cpu` in a process that sees GPUs which Ray has not given to it.

    Ray shows every GPU of a node to tasks, actors and jobs that have reserved none: all of them would load onto the first one.
    """
    ray = sys.modules.get("ray")
    if device != "auto":
        return device
    if ray is not None and ray.is_initialized():
        return device if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu"
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # the driver of `ray job submit`, with --entrypoint-num-gpus or without
    return "cpu" if in_job and not os.environ.get("CUDA_VISIBLE_DEVICES") else device


class BaseSection(Section):
    """The base model. It stays frozen; its own output comes out faster."""

    model: str = Field(EMBEDDED_BASE, description="directory, hub id (`org/name` or `org/name@revision`), .gguf file, or the "
                                                    "embedded model")
    dtype: Literal["auto", "bf16", "fp32", "int4", "int4-lossy"] = Field(
        "bf16", description="weight format; heads and trees belong to one. auto: the fastest format on this machine that holds "
                            "the checkpoint's own values; int4: a Q4_1 checkpoint's own codes, on a CPU; int4-lossy: 4-bit "
                            "codes made of any other base, which change its answers")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the base runs; auto: a GPU if there is one, in workers if they reserve it (workers.gpus)")
    context_limit: int | None = Field(None, ge=2, description="most tokens of prompt + answer; default: the model's own limit")

    def load(self, cache: Path | str, **changes: Any) -> Base:
        """Load the base with these settings; `cache`: folder for what is unpacked; `changes`: other arguments of `load_base`.

        A process of Ray that has reserved no GPU loads it on its CPU, unless a device is named. Raises InputError for a base that
        cannot be loaded.
        """
        import torch  # not needed by a reader of settings, nor is transformers

        from hydra_core.base import load_base

        device = reserved_device(self.device)
        if device != self.device and "device" not in changes and torch.cuda.is_available():
            log.warning("the base runs on a CPU: this worker reserves none of the GPUs here (workers.gpus)")
        wanted = {"dtype": self.dtype, "device": device, "context_limit": self.context_limit, "cache": Path(cache)}
        return load_base(self.model, **{**wanted, **changes})

    def load_weightless(self, cache: Path | str) -> WeightlessBase:
        """The base without its weights, for an engine that loads them itself. Raises InputError for one that cannot be found."""
        from hydra_core.base import load_weightless

        return load_weightless(self.model, dtype=self.dtype, cache=Path(cache), context_limit=self.context_limit)


class Reserved(Section):
    """What Ray reserves for each actor or worker, and the threads it really uses."""

    count: int | tuple[int, int] = Field(1, description="how many of them")
    cpus: float = Field(0.5, ge=0, description="logical CPUs to reserve for each; says nothing about threads")
    gpus: float = Field(0, ge=0, description="GPUs to reserve for each, a fraction to share one")
    threads: int = Field(2, ge=1, description="torch threads in each")


class Workers(Reserved):
    """Actors of a stage."""

    count: int = Field(1, ge=1, description="how many of them")


class TrackingSection(Section):
    """Where MLflow records runs."""

    uri: str | None = Field(None, description="MLflow's address; default: MLFLOW_TRACKING_URI, else SQLite under storage "
                                              "(none in an object store)")
    registry_uri: str | None = Field(None, description="address of the model registry; default: MLFLOW_REGISTRY_URI, else where "
                                                       "runs are recorded")
    experiment: str = Field("hydra-heads", description="name of the MLflow experiment")
    system_metrics: bool = Field(True, description="log the load of the machine while distill, train and bench run: processor, "
                                                   "memory, disk, network, GPUs")
