"""Whether a server answers, told within seconds: clients of their own accord retry for minutes."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

PROBE_SECONDS = 3
GATEWAY_ERRORS = (502, 503, 504)
"""Answers of a proxy whose server is gone."""


def why_unreachable(url: str) -> str | None:
    """Why `url` gives no answer within `PROBE_SECONDS` and a little, or None when it does."""
    def ask() -> str | None:
        try:
            urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:  # it answers; a proxy may hide the path
            return str(error) if error.code in GATEWAY_ERRORS else None
        return None

    return _within_seconds(ask)


def why_silent(host: str, port: int) -> str | None:
    """Why nothing takes a connection there within `PROBE_SECONDS` and a little, or None when something does."""
    def connect() -> None:
        socket.create_connection((host, port), PROBE_SECONDS).close()

    return _within_seconds(connect)


def _within_seconds(ask: Callable[[], str | None]) -> str | None:
    """What `ask` says or raises. It runs in a thread of its own, as looking a name up heeds no timeout."""
    faults: list[str | None] = []

    def run() -> None:
        try:
            faults.append(ask())
        except Exception as error:  # refused, unknown, no HTTP at all: whatever it is becomes part of one line
            faults.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return faults[0] if faults else f"silent for {PROBE_SECONDS + 1} s"
