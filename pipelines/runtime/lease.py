"""A lease on an output in an object store: what `lock` is on a file system.

    .NAME.lock/000001   who holds NAME; written anew every `BEAT` seconds

The highest number holds. It is created on condition, so that one of several runs gets it. A holder that is killed writes no more:
its lease ends after `LEASE` seconds, by the clock of the store alone, and the next run creates the next number. On the machine of
a killed holder the next run need not wait, as it sees that the process is gone.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import create, listing, remove, stored

BEAT = 20.0
LEASE = 90.0
ATTEMPTS = 5


class Lease:
    """One run's lease. `lost`: whether another run has taken it over, after this one could not renew it."""

    def __init__(self, folder: Path, shown: str) -> None:
        self.place, self.shown, self.lost = lease_folder(folder), shown, False
        self._about = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(), "key": secrets.token_hex(8),
                       "since": datetime.now(UTC).isoformat(timespec="seconds")}
        self._ended = threading.Event()
        self._own = self._take()
        threading.Thread(target=self._renew, daemon=True).start()

    def end(self) -> None:
        """Give the lease back, unless it is another run's by now."""
        self._ended.set()
        if not self.lost:
            remove(self._own)

    def _take(self) -> Path:
        for _ in range(ATTEMPTS):
            numbers = _numbers(self.place)
            if numbers:
                self._refuse_if_held(self.place / _name(numbers[-1]))
            own = self.place / _name(max(numbers, default=0) + 1)
            try:
                create(own, self._content())
            except FileExistsError:
                if _read(own).get("key") != self._about["key"]:  # else it was written, and the answer was lost
                    continue
            if _numbers(self.place)[-1:] != [int(own.name)]:  # this process slept between looking and creating
                remove(own)
                continue
            for number in numbers:
                remove(self.place / _name(number))
            return own
        raise InputError(f"{self.shown}: other runs begin to write to it: wait for them or stop them")

    def _refuse_if_held(self, top: Path) -> None:
        if (found := stored(top)) is None:  # given back in between
            return
        about = _read(top)
        if about.get("machine") == _machine() and not psutil.pid_exists(int(about.get("pid", 0))):
            return
        if _now(self.place) - found.written < LEASE:
            who = f" (process {about.get('pid')} on {about.get('host')}, since {about.get('since')})" if about else ""
            raise InputError(f"{self.shown}: another run writes to it{who}: wait for it or stop it (a killed one counts as "
                             f"stopped after {LEASE:.0f} s)")

    def _renew(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(Exception):  # the store does not answer: the next beat may succeed, or finds that the lease is lost
                if _numbers(self.place)[-1:] != [int(self._own.name)]:
                    self.lost = not self._ended.is_set()
                    return
                self._own.write_bytes(self._content())

    def _content(self) -> bytes:
        return json.dumps(self._about | {"beat": time.time()}).encode()


@contextmanager
def leased(folder: Path, shown: str) -> Iterator[Lease]:
    """Hold the lease of `folder` inside the block. Raises InputError, which names the holder, if another run holds it.

    `shown`: what errors call the folder.
    """
    lease = Lease(folder, shown)
    try:
        yield lease
    finally:
        lease.end()


def check_not_lost(lease: Lease) -> None:
    """Raise StoppedError if another run has taken over meanwhile."""
    if lease.lost:
        raise StoppedError(f"{lease.shown}: this run could not renew its lease, and another run has taken over: let that one "
                           "finish")


def lease_folder(folder: Path) -> Path:
    """Where the lease of `folder` lies."""
    return folder.parent / f".{folder.name}.lock"


def _numbers(place: Path) -> list[int]:
    return sorted(int(name) for name in listing(place) if name.isdecimal())


def _name(number: int) -> str:
    return f"{number:06d}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):  # given back in between, or not ours
        return {}
    return found if isinstance(found, dict) else {}


def _now(place: Path) -> float:
    """The time by the store's clock."""
    probe = place / f"clock-{secrets.token_hex(4)}"
    create(probe, b"")
    found = stored(probe)
    remove(probe)
    return found.written if found is not None and found.written else time.time()


def _machine() -> str:
    """What tells process numbers apart: the machine since it was started, and the container."""
    found = []
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
                 lambda: os.readlink("/proc/self/ns/pid")):
        try:
            found.append(read())
        except OSError:
            return secrets.token_hex(8)  # unlike any other
    return " ".join(found)
