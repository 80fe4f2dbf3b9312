"""What ends a run with one line: a user's mistake, work that stopped itself, a file system that takes no more."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import is_of_client, is_remote
from pipelines.runtime.provenance import without_credentials

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED = {errno.EACCES: "permission denied", errno.EPERM: "permission denied", errno.EROFS: "a read-only file system"}
BROKEN = {errno.EIO, errno.ESTALE}
"""A disk that fails, a network file system whose server went away."""
SCARCE = 64 << 20
"""Bytes; a file system with fewer counts as full."""
_FULL = re.compile(r"No space left on device|database or disk is full|Disk quota exceeded|\(os error 28\)|File too large"
                   r"|PytorchStreamWriter failed writing|inline_container.*unexpected pos")
_READ_ONLY = re.compile(r"attempt to write a readonly database|Read-only file system|\(os error 30\)")


def find_cause(error: BaseException) -> InputError | StoppedError | None:
    """The InputError or StoppedError that `error` is or comes from, or None.

    Ray wraps an exception that leaves a task, a training worker or an actor in others, whose text is a traceback. The
    exception that was being handled (`__context__`) is followed for Ray's alone: an error in this project's code that
    occurs while a mistake is handled is not the user's mistake.
    """
    for found in _chain(error):
        inner = getattr(found, "cause", None)  # of a RayTaskError; it is an InputError itself when its cause is one
        if isinstance(found, (InputError, StoppedError)) and not isinstance(inner, BaseException):
            return found
    return None


def tells_full(text: str) -> bool:
    """Whether an error's text tells of a full disk, here or on a server that answered so."""
    return _FULL.search(text) is not None


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, without credentials, or the exception's name where it has no text."""
    return without_credentials((str(error).strip().splitlines() or [type(error).__name__])[0])


def storage_fault(error: BaseException, folder: Path) -> StoppedError | None:
    """The one line for an `error` that comes from a full disk, a missing permission, a file system that is read-only or fails,
    else None.

    `folder`: where the work writes; named, with the room that is left, where the error names no file.
    """
    for found in _chain(error):
        if isinstance(found, OSError) and found.errno in REFUSED and found.filename is not None:
            return StoppedError(f"{found.filename}: {REFUSED[found.errno]}: nothing more was written; run the same command again "
                                "when that is mended")
        if (isinstance(found, OSError) and found.errno in FULL) or _FULL.search(str(found)):
            return StoppedError(_full(getattr(found, "filename", None), folder))
        if (isinstance(found, OSError) and found.errno == errno.EROFS) or _READ_ONLY.search(str(found)):
            return StoppedError(f"{folder}: a read-only file system: choose another storage=, or make it writable and run the "
                                "same command again")
        if isinstance(found, OSError) and found.errno in BROKEN:
            return StoppedError(f"{found.filename or folder}: the file system failed ({found.strerror}): what stands is whole; "
                                "run the same command again when that is mended")
        if is_remote(folder) and _of_store(found):
            return StoppedError(f"{folder}: the object store failed ({first_line(found)[:200]}): what stands is whole; run the "
                                "same command again when that is mended")
    return None


@contextmanager
def one_line(folder: Path) -> Iterator[None]:
    """Raise StoppedError in place of what `storage_fault` knows, in a worker whose exceptions others would wrap in pages."""
    try:
        yield
    except Exception as error:
        if find_cause(error) is not None or (fault := storage_fault(error, folder)) is None:
            raise
        raise fault from None


def _of_store(error: BaseException) -> bool:
    """Whether an exception is one of an object store: its client's own, or the OSError without a file that it is turned into."""
    cause = error.__cause__
    return is_of_client(error) or (isinstance(error, OSError) and error.filename is None and cause is not None
                                   and is_of_client(cause))


def _full(file: Any, folder: Path) -> str:
    """Names the file systems with little room among those that a stage writes to. What goes to an object store is written to the
    folder for temporary files first."""
    folder = Path(tempfile.gettempdir()) if is_remote(folder) else folder
    places = [Path(file).parent] if isinstance(file, str) and file else []
    places += [folder, Path(tempfile.gettempdir())]
    room = {place: free for place in dict.fromkeys(map(_existing, places)) if (free := _free(place)) is not None}
    scarce = [f"{place} has {free / 2**20:.1f} MiB left" for place, free in room.items() if free < SCARCE]
    left = room.get(_existing(folder), 0) / 2**20
    shown = " and ".join(scarce) or (f"a file could not grow in {folder}, though {left:.0f} MiB are free (a quota, or a limit of "
                                     "file sizes)")
    return f"the disk is full: {shown}: what stands is whole; make room and run the same command again"


def _existing(path: Path) -> Path:
    return next((one for one in (path, *path.parents) if one.is_dir()), path)


def _free(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it comes from, nearest first."""
    seen: list[BaseException] = []
    todo: list[Any] = [error]
    while todo:
        found = todo.pop(0)
        if not isinstance(found, BaseException) or any(found is one for one in seen):
            continue
        yield found
        seen.append(found)
        todo += [getattr(found, "cause", None), getattr(found, "controller_failure", None),
                 *getattr(found, "worker_failures", {}).values(), found.__cause__]
        todo += [found.__context__] if type(found).__module__.startswith("ray.") else []
