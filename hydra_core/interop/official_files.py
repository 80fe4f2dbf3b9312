"""Files of published heads: found, read without running any code in them, and every tensor accounted for."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hydra_core.errors import InputError
from hydra_core.storage import scheme_of

STEMS = ("hydra_lm_head", "medusa_lm_head")
"""Names of the file of heads in a published folder, without their suffix."""
PICKLED, SAFE = (".pt", ".bin", ".pth"), ".safetensors"
CONFIG = "config.json"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_places(source: Path, output: Path) -> tuple[Path, Path]:
    """The file of tensors and the config.json of `source`, which is a folder or the first of them.

    Raises InputError where either is missing, where a folder holds several files of heads, and where `output` exists.
    """
    if output.exists():
        raise InputError(f"{output}: already exists: name a new folder")
    if scheme_of(str(source)):
        raise InputError(f"{source}: heads are imported from a folder or a file of this machine: copy them here first")
    if source.is_dir():
        found = [source / f"{stem}{suffix}" for stem in STEMS for suffix in (*PICKLED, SAFE)]
        found = [path for path in found if path.is_file()]
        if not found:
            raise InputError(f"{source}: holds no published heads ({', '.join(f'{stem}.pt or {SAFE}' for stem in STEMS)}): name "
                             "their folder or their file")
        if len(found) > 1:
            raise InputError(f"{source}: holds {' and '.join(path.name for path in found)}: name one of the files")
        path = found[0]
    elif source.is_file():
        path = source
        if path.suffix not in (*PICKLED, SAFE):
            raise InputError(f"{path}: is not a file of tensors ({', '.join((*PICKLED, SAFE))})")
    else:
        raise InputError(f"{source}: no such folder or file (what is on a hub is downloaded first)")
    config = path.with_name(CONFIG)
    if not config.is_file():
        raise InputError(f"{config}: is missing: it says how many heads of what kind {path.name} holds")
    return path, config


def read_values(path: Path) -> dict[str, Any]:
    """The object in a config.json. Raises InputError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object")
    return values


class OfficialTensors:
    """The tensors of a file by their names there. Each is taken by name and shape; `check_all_taken` tells of those that nobody
    took, so that none is dropped in silence."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left = _read_tensors(path)
        self.names = tuple(self._left)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor that may be there, taken or not."""
        return tuple(self._left[name].shape) if name in self._left else None

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, of float16, bfloat16 or float32. Raises InputError where it is missing, of another shape or dtype,
        or holds a number that is not finite."""
        if name not in self._left:
            raise InputError(f"{self.path}: tensor {name} is missing")
        tensor = self._left.pop(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{self.path}: tensor {name} has shape {tuple(tensor.shape)}, not {shape}")
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise InputError(f"{self.path}: tensor {name} is of {tensor.dtype} ({tensor.layout}), which heads are not")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{self.path}: tensor {name} holds a number that is not finite")
        return tensor.detach()

    def take_optional(self, name: str, *shape: int) -> Tensor | None:
        """The same of a tensor that may be missing."""
        return self.take(name, *shape) if name in self._left else None

    def check_all_taken(self, described: str) -> None:
        """Raise InputError for a tensor that was not taken; `described`: what the config.json says, by which it is a stray."""
        if self._left:
            first = min(self._left)
            raise InputError(f"{self.path}: unexpected tensor {first} ({len(self._left)} in all): {described}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors, mapped rather than read where the format allows that."""
    try:
        if path.suffix == SAFE:
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: is truncated, or not what its name says ({reason})") from None
    except Exception:  # a parser of arbitrary bytes may raise anything
        raise InputError(f"{path}: is truncated, or holds more than tensors: only those are loaded, since anything else is code "
                         "that would run") from None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found):
        raise InputError(f"{path}: is not a map of names to tensors")
    if other := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{path}: {other[0]} is a {type(found[other[0]]).__name__}, not a tensor")
    return dict(found)
