"""A lock on an output folder: two runs at the same time would compute the same rows and remove each other's files."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from hydra_core.errors import InputError
from hydra_core.files import NO_LOCKS
from hydra_core.storage import is_remote
from pipelines.runtime.console import say
from pipelines.runtime.lease import Lease, check_not_lost, lease_folder, leased

_held: dict[Path, int] = {}
"""Lock files that this process holds, with the thread that does."""
_leases: dict[Path, Lease] = {}
"""Leases that this process holds, by their folder."""


@contextmanager
def only_run(folder: Path, storage: Path, field: str | None = None) -> Iterator[None]:
    """Hold the lock of `folder` inside the block. Raises InputError, which names the holder, if another run holds it.

    It is a lock of the operating system on a file beside the folder, so it ends with its process, however that ends. The file
    names the holder. At the end it is removed, and with it the folders above it inside `storage` that are then empty. A link
    to a folder has the lock of that folder. `field`: the setting that `folder` comes from, None for a folder of the run: where
    the file system has no locks, that one is used without, after a warning, and the other one raises InputError. In an object
    store it is a lease.
    """
    path = _lock_file(folder)
    if is_remote(folder):
        with leased(folder, f"{field}={folder}" if field else str(folder)) as lease:
            _held[path], _leases[path] = threading.get_ident(), lease
            try:
                yield
            finally:
                del _held[path], _leases[path]
        return
    descriptor = _locked(path, f"{field}={folder}" if field else str(folder), needed=field is not None)
    _held[path] = threading.get_ident()
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(),
                                         "since": datetime.now(UTC).isoformat(timespec="seconds")}).encode())
        yield
    finally:
        del _held[path]
        path.unlink(missing_ok=True)
        os.close(descriptor)
        _remove_empty(path.parent, storage)


def holds(folder: Path) -> bool:
    """Whether this thread is inside `only_run` of `folder`."""
    return _held.get(_lock_file(folder)) == threading.get_ident()


def check_held(folder: Path) -> None:
    """Raise StoppedError if another run has taken over the lease of `folder` from this one."""
    if (lease := _leases.get(_lock_file(folder))) is not None:
        check_not_lost(lease)


def _lock_file(folder: Path) -> Path:
    if is_remote(folder):
        return lease_folder(folder)
    real = folder.resolve()
    return real.parent / f".{real.name}.lock"


def _locked(path: Path, shown: str, needed: bool) -> int:
    """An open descriptor of the lock file, locked. `shown`: what errors call the folder; `needed`: refuse a file system without
    locks."""
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
            raise InputError(f"{shown}: another run writes to it{holder}: wait for it or stop it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            if needed:
                os.close(descriptor)
                raise InputError(f"{shown}: this file system has no locks ({error.strerror}): choose a folder on one "
                                 "that has, as NFS 4 and local disks do") from None
            say("storage", f"{shown}: this file system has no locks ({error.strerror}): see to it that no other run writes there")
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
