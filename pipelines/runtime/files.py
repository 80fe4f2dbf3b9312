"""Writing, copying and removing on any storage: what is written appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hydra_core import storage
from hydra_core.files import atomic_file, atomic_folder

if TYPE_CHECKING:
    import numpy as np

__all__ = ["append_line", "atomic_file", "atomic_folder", "copy_file", "copy_folder", "move", "remove_empty", "remove_file",
           "remove_tree", "write_array", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8. Folders above it are made."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_array(path: Path, values: np.ndarray) -> None:
    """Write `values` to `path` in NumPy's format, without pickles."""
    import numpy as np

    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of one file."""
    with atomic_file(target) as temporary:
        shutil.copyfile(storage.local_copy(source), temporary)


def copy_folder(source: Path, target: Path) -> None:
    """Copy `source` with all that is in it to `target`, in place of an older folder there."""
    with atomic_folder(target) as temporary:
        shutil.copytree(storage.local_copy(source), temporary, dirs_exist_ok=True)


def move(path: Path, target: Path) -> None:
    """Give a file another name on the same storage. In an object store it has both for a moment."""
    if not storage.is_remote(path):
        path.replace(target)
        return
    with atomic_file(target) as temporary:
        temporary.write_bytes(path.read_bytes())
    storage.remove(path)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file that one process writes; it is kept when this returns. Half a line that a kill left is ended first,
    so that it does not become part of this one.

    An object is written anew: for files of some thousand lines.
    """
    if storage.is_remote(path):
        before = path.read_bytes() if path.exists() else b""
        with atomic_file(path) as temporary:
            temporary.write_bytes(before + line + b"\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as handle:
        if handle.tell():
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":
                handle.write(b"\n")
        handle.write(line + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


def remove_file(path: Path) -> None:
    """Remove a file, if there is one."""
    if storage.is_remote(path):
        storage.remove(path)
    else:
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, if there is one; what cannot be removed stays."""
    if storage.is_remote(path):
        storage.remove_below(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_empty(folder: Path) -> bool:
    """Remove a folder if nothing is in it; whether it is gone. An object store has no empty folders."""
    if storage.is_remote(folder):
        return not storage.listing(folder)
    try:
        folder.rmdir()
    except OSError:
        return not folder.exists()
    return True
