"""Which log lines reach the user."""

import functools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def speak() -> None:
    """Show the log lines of `hydra_core` on stderr: the memory that it takes and how a base runs."""
    logger = logging.getLogger("hydra_core")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


_RECORD = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) \d{4}-\d\d-\d\d ")
"""How a line of Serve's own log begins."""
_AT_SHUTDOWN = re.compile(r"Task ServeController\.\w+ failed\. There are .* retries remaining")
"""Serve's controller is killed at a clean shutdown while it is being asked for changes."""
_STUCK = re.compile(r"taken more than|schedul|resources|initializ", re.IGNORECASE)
"""A warning of Serve's that explains why nothing happens: a cluster that cannot give what a replica asks for."""
_DIED = re.compile(r"Exception when trying to get routing stats")
"""Serve's controller was asking a replica that has died, of which it tells in a line of its own: with two tracebacks."""
_BUSY = re.compile(r"WARNING .*Failed to get queue length from Replica")
"""A replica did not answer its router within 0.1 s, as on a busy machine; the router asks again."""
_dropped: set[Any] = set()
_with_traceback: set[Any] = set()
"""Processes whose output is left out: up to the next record, and of some records with a traceback too."""


@functools.cache
def quieten_driver() -> None:
    """Keep log lines of Ray, Ray Data and Serve that report no error off the user's terminal. Call it before `ray.init`.

    Errors, and whatever our own code writes in workers, are still shown. Ray's log files keep the rest.
    """
    import ray._private.worker as worker

    worker.print_to_stdstream = _filtered(worker.print_to_stdstream)
    worker.connect = _without_core_log(worker.connect)
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it warns of every slow answer on a busy machine
    for handler in logging.getLogger("ray.data").handlers:
        if handler.get_name() == "console":
            handler.setLevel(logging.ERROR)


def wanted_lines(data: dict[str, Any]) -> list[str]:
    """The lines of a batch from one process of the cluster that a user sees.

    `data`: as Ray publishes it, with `lines`, `pid` ("raylet" for messages of the cluster) and, of an actor, `actor_name`.
    """
    actor = str(data.get("actor_name") or "")
    if data["pid"] == "raylet":
        return [line for line in data["lines"] if not _AT_SHUTDOWN.search(line)]
    if actor.startswith("ServeReplica:"):  # our own lines are no records
        return [line for line in data["lines"] if not line.startswith("INFO ") and not _BUSY.match(line)]
    if actor.startswith(("ServeController", "ProxyActor")):
        return list(_without_records(data["lines"], data["pid"]))
    return list(data["lines"])


def _without_records(lines: list[str], pid: Any) -> Iterator[str]:
    """Leave out records below ERROR, and what a replica's death adds to them, with the lines that continue them, which may come
    in a later batch of the process."""
    for line in lines:
        if found := _RECORD.match(line):
            died = _DIED.search(line) is not None
            quiet = died or found[1] in ("DEBUG", "INFO") or (found[1] == "WARNING" and not _STUCK.search(line))
            (_dropped.add if quiet else _dropped.discard)(pid)
            (_with_traceback.add if died else _with_traceback.discard)(pid)
        elif line.startswith("Traceback") and pid not in _with_traceback:
            _dropped.discard(pid)
        if pid not in _dropped:
            yield line


def _filtered(show: Callable[..., None]) -> Callable[..., None]:
    def show_wanted(data: dict[str, Any], *rest: Any, **more: Any) -> None:
        if lines := wanted_lines(data):
            show({**data, "lines": lines}, *rest, **more)

    return show_wanted


def _without_core_log(connect: Callable[..., Any]) -> Callable[..., Any]:
    """Connect without the C++ log of this process on stderr: it warns of every pool of Ray Data's actors as an error.

    Ray reads the level once, when a process connects, and writes a line about it; processes that it has started before keep
    their own level.
    """
    def connect_quietly(*arguments: Any, **more: Any) -> Any:
        with _environment("RAY_BACKEND_LOG_LEVEL", "fatal"), _stderr_without("Set ray log level from environment variable"):
            return connect(*arguments, **more)

    return connect_quietly


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """`name` is `value` inside the block, unless the user has set it."""
    before = os.environ.get(name)
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)


@contextmanager
def _stderr_without(text: str) -> Iterator[None]:
    """Hold back what is written to file descriptor 2 inside the block, and write it afterwards without lines with `text`."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held.read().splitlines(keepends=True):
                if text.encode() not in line:
                    os.write(2, line)
