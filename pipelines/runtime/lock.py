"""A lock on an output folder of `batch`: two runs at the same time would compute the same rows."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from hydra_core.errors import InputError


@contextmanager
def only_run(folder: Path, storage: Path) -> Iterator[None]:
    """Hold the lock of `folder` inside the block. Raises InputError, which names the holder, if another run holds it.

    It is a lock of the operating system on a file beside the folder, so it ends with its process, however that ends. The file
    names the holder. At the end it is removed, and with it the folders above it inside `storage` that are then empty.
    """
    path = folder.parent / f".{folder.name}.lock"
    descriptor = _locked(path, folder)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(),
                                         "since": datetime.now(UTC).isoformat(timespec="seconds")}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        _remove_empty(path.parent, storage)


def _locked(path: Path, folder: Path) -> int:
    """An open descriptor of the lock file, locked."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another run has ended and removed its empty folder in between
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise InputError(f"batch.output={folder}: another run writes to it{holder}: wait for it or stop it") from None
        except OSError as error:
            os.close(descriptor)
            raise InputError(f"batch.output={folder}: this file system has no locks ({error.strerror}): choose a folder on one "
                             "that has, as NFS 4 and local disks do") from None
        if _same_file(descriptor, path):
            return descriptor
        os.close(descriptor)  # the earlier holder has removed the file in between


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (ValueError, KeyError, TypeError):  # the holder has not written its name yet
        return ""


def _remove_empty(folder: Path, storage: Path) -> None:
    for parent in (folder, *folder.parents):
        if storage not in parent.parents:
            return
        try:
            parent.rmdir()
        except OSError:  # it is not empty
            return
