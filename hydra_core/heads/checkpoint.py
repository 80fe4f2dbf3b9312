"""Heads on disk, as safetensors. Loading is strict: nothing may be missing, unexpected or of another shape.

    FOLDER/config.json        schema version, base identity, architecture, draft vocabulary size
    FOLDER/model.safetensors  trained tensors and the draft vocabulary's ids
    FOLDER/tree.json          the tree for each batch size
    FOLDER/provenance.json    how they were made
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydra_core.base.vocabulary import BaseIdentity, BaseVocabulary
from hydra_core.errors import InputError
from hydra_core.files import atomic_file, atomic_folder
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig, build_drafter
from hydra_core.storage import local_copy
from hydra_core.tree.draft_tree import TreeSet

SCHEMA_VERSION = 1
DRAFT_IDS = "draft_vocab.ids"


@dataclass(frozen=True)
class LoadedHeads:
    """Heads ready to decode or to be trained further, with their trees."""

    drafter: HeadDrafter
    trees: TreeSet
    folder: Path


def save_checkpoint(folder: Path, drafter: HeadDrafter, identity: BaseIdentity, trees: TreeSet,
                    provenance: dict[str, Any]) -> None:
    """Write the whole folder or nothing; an existing one is replaced when the new one is complete."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    tensors[DRAFT_IDS] = drafter.draft_vocab.ids.cpu()
    config = {
        "schema_version": SCHEMA_VERSION,
        "base": {"name": identity.name, "digest": identity.digest, "weight_format": identity.weight_format},
        "heads": drafter.config.model_dump(),
        "vocab_size": drafter.draft_vocab.size,
        "draft_vocab_size": len(drafter.draft_vocab),
        "width": drafter.vocabulary.width,
    }
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors")
        for name, value in (("config", config), ("tree", trees.to_json()), ("provenance", provenance)):
            text = json.dumps(value, indent=2, sort_keys=True)
            (temporary / f"{name}.json").write_text(text, encoding="utf-8")


def restrict_checkpoint(folder: Path, draft_vocab: DraftVocab) -> None:
    """Restrict the heads in `folder` to drafting these tokens; trained tensors do not change."""
    tensors, config = _read_tensors(folder / "model.safetensors"), _read_json(folder / "config.json")
    tensors[DRAFT_IDS] = draft_vocab.ids
    config["draft_vocab_size"] = config["heads"]["draft_vocab_size"] = len(draft_vocab)
    with atomic_file(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    with atomic_file(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_checkpoint(folder: Path, vocabulary: BaseVocabulary, dtype: torch.dtype = torch.float32) -> LoadedHeads:
    """Load heads for the base of `vocabulary`, in `dtype`, for inference. `folder`: on any storage.

    Raises InputError for a missing or broken file, another schema, another base (digest), or tensors that are missing,
    unexpected or of another shape.
    """
    folder = local_copy(folder)
    config = _read_json(folder / "config.json")
    if config.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{folder}/config.json: schema_version {config.get('schema_version')} is not {SCHEMA_VERSION}")
    _check_base(folder, config, vocabulary)
    try:
        heads = HeadsConfig.model_validate(config["heads"])
    except (KeyError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "no `heads`"
        raise InputError(f"{folder}/config.json: heads: {reason}") from None
    tensors = _read_tensors(folder / "model.safetensors")
    ids = tensors.pop(DRAFT_IDS, None)
    if ids is None:
        raise InputError(f"{folder}/model.safetensors: tensor {DRAFT_IDS} is missing")
    try:
        draft_vocab = DraftVocab(ids, vocabulary.size)
    except ValueError as error:
        raise InputError(f"{folder}/model.safetensors: {DRAFT_IDS}: {error}") from None
    drafter = build_drafter(heads, vocabulary, draft_vocab)
    _check_tensors(folder, tensors, drafter.state_dict())
    drafter.load_state_dict(tensors, strict=True)
    trees = TreeSet.from_json(_read_json(folder / "tree.json"), f"{folder}/tree.json")
    if trees.max_depth > heads.num_heads:
        raise InputError(f"{folder}/tree.json: a tree of depth {trees.max_depth} needs more than {heads.num_heads} heads")
    return LoadedHeads(drafter.to(dtype).eval().requires_grad_(False), trees, folder)


def _check_base(folder: Path, config: dict[str, Any], vocabulary: BaseVocabulary) -> None:
    """Compare the digest; the weight format may differ, since heads only draft."""
    base = config.get("base")
    if not isinstance(base, dict) or "digest" not in base:
        raise InputError(f"{folder}/config.json: base: names no digest")
    if base["digest"] != vocabulary.identity.digest:
        raise InputError(f"{folder}: these heads belong to base {base.get('name')} ({base['digest'][:16]}), not to "
                         f"{vocabulary.identity.name} ({vocabulary.identity.digest[:16]}): use that base or train again")


def _check_tensors(folder: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    where = f"{folder}/model.safetensors"
    if missing := sorted(wanted.keys() - found.keys()):
        raise InputError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(found.keys() - wanted.keys()):
        raise InputError(f"{where}: unexpected tensor {extra[0]} ({len(extra)} in all)")
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            raise InputError(f"{where}: tensor {name} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): name the folder of a heads checkpoint") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must be a JSON object")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise InputError(f"{path}: is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: is truncated or not safetensors ({error})") from None
