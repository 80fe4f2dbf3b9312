"""Settings that several stages share: the base, workers, tracking."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hydra_core.base.embedded import EMBEDDED_BASE
from pipelines.config.section import Section

if TYPE_CHECKING:
    from hydra_core.base import Base


class BaseSection(Section):
    """The base model. It stays frozen; its own output comes out faster."""

    model: str = Field(EMBEDDED_BASE, description="directory, hub id, .gguf file, or the embedded model")
    dtype: Literal["auto", "bf16", "fp32", "int4", "int4-lossy"] = Field(
        "bf16", description="weight format; heads and trees belong to one. auto: the fastest format on this machine that holds "
                            "the checkpoint's own values; int4: a Q4_1 checkpoint's own codes, on a CPU; int4-lossy: 4-bit "
                            "codes made of any other base, which change its answers")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the base runs; auto: a GPU if there is one")
    context_limit: int | None = Field(None, ge=2, description="most tokens of prompt + answer; default: the model's own limit")

    def load(self, cache: Path | str, **changes: Any) -> Base:
        """Load the base with these settings; `cache`: folder for what is unpacked; `changes`: other arguments of `load_base`.

        Raises InputError for a base that cannot be loaded.
        """
        from hydra_core.base import load_base  # imports torch and transformers, which a reader of settings does not need

        wanted = {"dtype": self.dtype, "device": self.device, "context_limit": self.context_limit, "cache": Path(cache)}
        return load_base(self.model, **{**wanted, **changes})


class Workers(Section):
    """What Ray reserves for each actor or worker, and the threads it really uses."""

    count: int = Field(1, ge=1, description="how many of them")
    cpus: float = Field(0.5, ge=0, description="logical CPUs to reserve for each; says nothing about threads")
    gpus: float = Field(0, ge=0, description="GPUs to reserve for each, a fraction to share one")
    threads: int = Field(2, ge=1, description="torch threads in each")


class TrackingSection(Section):
    """Where MLflow records runs."""

    uri: str | None = Field(None, description="MLflow's address; default: MLFLOW_TRACKING_URI, else SQLite under storage")
    experiment: str = Field("hydra-heads", description="name of the MLflow experiment")
