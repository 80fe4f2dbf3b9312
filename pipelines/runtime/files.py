"""Writing a text, an array or a copy of a folder that appears whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hydra_core.files import atomic_file, atomic_folder

if TYPE_CHECKING:
    import numpy as np

__all__ = ["atomic_file", "atomic_folder", "copy_folder", "write_array", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8. Folders above it are made."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_array(path: Path, values: np.ndarray) -> None:
    """Write `values` to `path` in NumPy's format, without pickles."""
    import numpy as np

    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def copy_folder(source: Path, target: Path) -> None:
    """Copy `source` with all that is in it to `target`, in place of an older folder there."""
    with atomic_folder(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
