"""A draft model by its name, as a setting or a configuration names it; loaded only when an engine needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hydra_core.base.load import load_base
from hydra_core.base.model import Base
from hydra_core.base.resolve import ResolvedBase, default_cache, resolve_base
from hydra_core.errors import InputError
from hydra_core.proposers import DraftModel, Growth

SETTING = "draft_model.model"


@dataclass(frozen=True)
class DraftModelSettings:
    """`model`: as `load_base` takes it; `growth`: the trees that it drafts."""

    model: str
    growth: Growth = field(default_factory=Growth)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DraftModelSettings:
        """From plain values, `model` and the fields of `Growth`. Raises TypeError, KeyError and ValueError for others."""
        return cls(str(values["model"]), Growth(**{name: value for name, value in values.items() if name != "model"}))

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `of`."""
        return {"model": self.model, **asdict(self.growth)}


def find_draft_model(settings: DraftModelSettings, cache: Path | None = None) -> ResolvedBase:
    """The folder and digest of the draft model. No weights are loaded. Raises InputError when there is none."""
    try:
        return resolve_base(settings.model, cache or default_cache())
    except InputError as error:
        raise _renamed(error) from None


def open_draft_model(settings: DraftModelSettings, base: Base, cache: Path | None = None) -> DraftModel:
    """The draft model on the device of `base`, in its precision: full where the base has it, else bf16.

    Raises InputError when it cannot be found or loaded; whether it fits `base` is checked by the engine.
    """
    dtype = "fp32" if base.dtype in (torch.float32, torch.float64) else "bf16"
    try:
        return DraftModel(load_base(settings.model, dtype=dtype, device=str(base.device), cache=cache), settings.growth)
    except InputError as error:
        raise _renamed(error) from None


def _renamed(error: InputError) -> InputError:
    """The same message about the setting that names the draft model."""
    return InputError(str(error).replace("base.model=", f"{SETTING}="))
