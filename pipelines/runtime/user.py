"""Users as containers have them: without a name, without a home, or with a home that cannot be written."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

from pipelines.runtime.console import say
from pipelines.runtime.ray_access import private_folder


def complete_user() -> None:
    """Give this process, and those that it starts, what libraries ask of a user: a name, a home, a folder for caches.

    Call it when the settings are read: without a home there is no default `storage`. What is given here lies in a temporary
    folder of this user, and holds nothing but caches.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # no such user in the system's list, and none in the environment
        os.environ["USER"] = os.environ["LOGNAME"] = f"user-{os.getuid()}"
    try:
        home = Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(_temporary())
        say("user", f"this user has no home folder: libraries keep their caches in {os.environ['HOME']}")
        return
    if "XDG_CACHE_HOME" not in os.environ and not _writable(home / ".cache"):
        os.environ["XDG_CACHE_HOME"] = str(_temporary() / ".cache")
        say("user", f"{home} cannot be written: libraries keep their caches in {os.environ['XDG_CACHE_HOME']}")


def _temporary() -> Path:
    folder = private_folder() / "home"
    folder.mkdir(exist_ok=True)
    return folder


def _writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which is made if it is missing. Modes do not say it of a file system that is mounted
    for reading, or to a superuser."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
