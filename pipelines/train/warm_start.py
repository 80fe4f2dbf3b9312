"""Heads whose weights training starts from: another run's, or the bundled ones."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hydra_core.base import BaseVocabulary
from hydra_core.bundled import BUNDLED, is_bundled
from hydra_core.errors import InputError
from hydra_core.heads import HeadsConfig
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.storage import as_path
from pipelines.config import RunConfig
from pipelines.rows.schemas import content_id
from pipelines.runtime.artifacts import input_digest
from pipelines.tracking.lookup import bundled_heads

SHAPE = ("kind", "num_heads", "num_blocks", "mlp", "final_norm", "normalise_embeddings", "recurrent", "skip_bias",
         "own_rows", "taps")
"""Settings that must be the same in both: they decide the shapes of the weights. The others do not."""


def start_folder(config: RunConfig, name: str) -> Path | None:
    """The heads folder that drafter `name` starts from, or None. Raises InputError if the bundled heads are asked for and the
    base has none."""
    given = config.train.start.get(name)
    if not is_bundled(given):
        return as_path(given) if given else None
    found = bundled_heads(config)
    if found is None:
        raise InputError(f"train.start.{name}={BUNDLED}: no heads for base {config.base.model} come with the package")
    return Path(found)


def start_digest(config: RunConfig, name: str) -> str | None:
    """Digest of the weights and the shape that drafter `name` starts from, or None. Raises InputError for a folder
    without heads."""
    folder = start_folder(config, name)
    if folder is None:
        return None
    files = [folder / "config.json", folder / "model.safetensors"]
    if missing := [path for path in files if not path.is_file()]:
        raise InputError(f"train.start.{name}={folder}: {missing[0].name} is missing: name the folder of a heads checkpoint")
    return content_id(*(input_digest(f"train.start.{name}", file) for file in files))


def check_start(config: RunConfig, name: str, vocabulary: BaseVocabulary) -> None:
    """Raise InputError, before any worker starts, if drafter `name` cannot start from the heads that the settings name."""
    if (folder := start_folder(config, name)) is not None:
        _weights(folder, name, config.train.drafters[name], vocabulary)


def load_start(drafter: nn.Module, config: RunConfig, name: str, vocabulary: BaseVocabulary) -> None:
    """Load the weights that `drafter` starts from, if any; its draft vocabulary stays."""
    if (folder := start_folder(config, name)) is not None:
        drafter.load_state_dict(_weights(folder, name, config.train.drafters[name], vocabulary).state_dict())


def _weights(folder: Path, name: str, wanted: HeadsConfig, vocabulary: BaseVocabulary) -> nn.Module:
    loaded = load_checkpoint(folder, vocabulary).drafter
    for field in SHAPE:
        if getattr(loaded.config, field) != getattr(wanted, field):
            raise InputError(f"train.start.{name}={folder}: {field} is {getattr(loaded.config, field)} there and "
                             f"{getattr(wanted, field)} in train.drafters.{name}")
    return loaded
