"""Whether a server answers, told within seconds: clients of their own accord retry for minutes."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request

PROBE_SECONDS = 5
GATEWAY_ERRORS = (502, 503, 504)
"""Answers of a proxy whose server is gone."""


def why_unreachable(url: str) -> str | None:
    """Why `url` gives no answer within `PROBE_SECONDS` and a little, or None when it does.

    The request runs in a thread of its own, as looking a name up heeds no timeout.
    """
    faults: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
            faults.append(None)
        except urllib.error.HTTPError as error:  # it answers; a proxy may hide the path
            faults.append(str(error) if error.code in GATEWAY_ERRORS else None)
        except Exception as error:  # refused, unknown, no HTTP at all: whatever it is becomes part of one line
            faults.append(str(error) or type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 2)
    return faults[0] if faults else f"silent for {PROBE_SECONDS + 2} s"
