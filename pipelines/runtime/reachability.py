"""Whether a server answers, within seconds: the retries of clients take minutes."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable

PROBE_SECONDS = 3
GATEWAY_ERRORS = (502, 503, 504)
"""Status codes of a proxy whose server does not answer."""


LOOPBACK = ("localhost", "127.0.0.1", "::1")


def spare_loopback() -> None:
    """Keep the proxy that the environment names, if any, away from servers on this machine, here and in every process started
    from here: it could not reach them."""
    if not any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    spared = [one.strip() for one in given.split(",") if one.strip()]
    if "*" not in spared:
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(dict.fromkeys((*spared, *LOOPBACK)))


def why_unreachable(url: str) -> str | None:
    """Why `url` does not answer within about `PROBE_SECONDS`, or None if it does."""
    def ask() -> str | None:
        try:
            # not `urlopen`: it keeps the proxies that the environment named at its first call
            urllib.request.build_opener().open(url, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:  # the server answers, though a proxy may not serve this path
            return str(error) if error.code in GATEWAY_ERRORS else None
        except urllib.error.URLError as error:
            # something answers, with a certificate that a client's own settings may know (a private authority, no check)
            if not isinstance(error.reason, ssl.SSLError):
                raise
        return None

    return _within_seconds(ask)


def why_silent(host: str, port: int) -> str | None:
    """Why nothing accepts a connection there within about `PROBE_SECONDS`, or None if something does."""
    def connect() -> None:
        socket.create_connection((host, port), PROBE_SECONDS).close()

    return _within_seconds(connect)


def _within_seconds(ask: Callable[[], str | None]) -> str | None:
    """The result of `ask`, or the text of its exception. It runs in a thread, as a look-up of a name has no timeout."""
    faults: list[str | None] = []

    def run() -> None:
        try:
            faults.append(ask())
        except Exception as error:  # a refusal, an unknown name, no HTTP: each becomes part of one line
            faults.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return faults[0] if faults else f"silent for {PROBE_SECONDS + 1} s"
