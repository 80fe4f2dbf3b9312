"""Published heads as a heads folder of this project."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.heads import HeadsConfig, save_checkpoint
from hydra_core.interop.official_files import OfficialTensors, check_places, read_values
from hydra_core.interop.official_layouts import Described, map_heads
from hydra_core.tree.draft_tree import default_trees


@dataclass(frozen=True)
class ImportedHeads:
    """What was imported. `parameters`: numbers in the written tensors; `notes`: what the user should know of these files."""

    config: HeadsConfig
    parameters: int
    notes: tuple[str, ...]


def import_official(source: Path, output: Path, vocabulary: BaseVocabulary, provenance: Mapping[str, Any]) -> ImportedHeads:
    """Write the heads of `source`, a published folder or the file of tensors in it, as the heads folder `output`.

    Tensors keep their dtype. The trees are those that are used before anything is measured. `output`: on any storage; it appears
    whole or not at all. Raises InputError where `check_places` and `map_heads` do.
    """
    path, config = check_places(source, output)
    values = read_values(config)
    mapped = map_heads(OfficialTensors(path), Described(config, values), vocabulary)
    drafter = mapped.drafter
    drafter.load_state_dict(_unshared(mapped.tensors), strict=True, assign=True)
    origin = {"imported": {"file": path.name, "sha256": _digest(path), "config": values}}
    save_checkpoint(output, drafter, vocabulary.identity, default_trees(drafter.num_heads), {**provenance, **origin})
    return ImportedHeads(drafter.config, sum(one.numel() for one in drafter.parameters()), mapped.notes)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own: the later blocks of a published head are one block under several names."""
    seen: set[int] = set()
    alone = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        alone[name] = tensor
    return alone


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
