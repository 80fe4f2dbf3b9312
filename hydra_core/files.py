"""Atomic writes of files and folders, and lock files.

On a file system they are written under a temporary name next to the target, then renamed; for an object store they are written to
a temporary folder of this machine, then uploaded.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hydra_core import storage

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file next to `path`; it replaces `path` when the block ends, and is removed when it raises.

    The content is on the disk before the name is. The mode follows the umask, unlike that of `tempfile.mkstemp` or of a file
    that safetensors has written.
    """
    if storage.is_remote(path):
        with storage.work_folder() as folder:
            (folder / path.name).touch()
            yield folder / path.name
            storage.upload(folder / path.name, path)
        return
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        _set_mode(temporary, mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`; it takes its place when the block ends, and is removed when it raises.

    An existing folder is moved to a name of its own first and removed afterwards: a kill in between leaves no half of either.
    Everything inside gets the mode that the umask allows, whatever mode it was written or copied with.
    """
    if storage.is_remote(folder):
        with storage.work_folder() as made:
            yield made
            storage.upload_folder(made, folder)
        return
    _make_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    temporary.mkdir()
    mode, older = stat.S_IMODE(temporary.stat().st_mode), temporary.with_suffix(".old")
    try:
        yield temporary
        _set_mode(temporary, mode)
        for path in temporary.rglob("*"):
            _set_mode(path, mode if path.is_dir() else stat.S_IMODE(path.stat().st_mode) | mode & 0o666)
            if path.is_file():
                sync(path)
        if folder.exists():
            os.replace(folder, older)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if older.exists() and not folder.exists():
            os.replace(older, folder)
        raise
    shutil.rmtree(older, ignore_errors=True)
    sync(folder.parent)


@contextmanager
def file_lock(path: Path | str, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path`, waiting for it at most `timeout` seconds (below 0: as long as it takes). Where the file system
    has no locks the block runs without: several may do then what it guards, each whole. Raises `filelock.Timeout`."""
    lock = FileLock(path, timeout=timeout)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout) or (isinstance(error, OSError) and error.errno not in NO_LOCKS):
            raise
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _make_folder(folder: Path) -> None:
    """Make `folder` and those above it; the names of new ones are on the disk afterwards."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in new:
        sync(one.parent)


def _set_mode(path: Path, mode: int) -> None:
    with suppress(OSError):  # a file system without modes
        path.chmod(mode)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Some file systems know no such wait for folders, and a folder
    that may be written to need not be readable."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if folder:
            return
        raise
    try:
        with suppress(OSError) if folder else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
