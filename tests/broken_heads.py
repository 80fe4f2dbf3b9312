"""Every way in which a heads checkpoint can be no good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DAMAGES = ("no tensors", "no tree", "truncated", "missing key", "extra key", "misshapen key", "another base")


def break_heads(heads: Path, target: Path, damage: str) -> Path:
    """A copy of `heads` with one of `DAMAGES`."""
    shutil.copytree(heads, target)
    weights = target / "model.safetensors"
    tensors = load_file(weights)
    first = min(name for name in tensors if name != "draft_vocab.ids")
    if damage == "no tensors":
        weights.unlink()
    elif damage == "no tree":
        (target / "tree.json").unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing key":
        save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights)
    elif damage == "extra key":
        save_file(tensors | {"extra": torch.zeros(1)}, weights)
    elif damage == "misshapen key":
        save_file(tensors | {first: torch.zeros(2, 3)}, weights)
    elif damage == "another base":
        path = target / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(values | {"base": values["base"] | {"digest": "0" * 64}}), encoding="utf-8")
    else:
        raise ValueError(damage)
    return target
