"""The one way of writing a text or an array: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hydra_core.files import atomic_file, atomic_folder

if TYPE_CHECKING:
    import numpy as np

__all__ = ["atomic_file", "atomic_folder", "write_array", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8. Folders above it are made."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_array(path: Path, values: np.ndarray) -> None:
    """Write `values` to `path` in NumPy's format, without pickles."""
    import numpy as np

    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)
