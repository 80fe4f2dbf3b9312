"""The processes that tests start, found by what they call themselves."""

from __future__ import annotations

from contextlib import suppress

import psutil


def children(*words: str) -> list[psutil.Process]:
    """Those below this process whose command line holds all `words`."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            line = " ".join(child.cmdline())
            if all(word in line for word in words):
                found.append(child)
    return found
