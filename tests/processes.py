"""The processes that tests start, found by what they call themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
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


def killed_when(ready: Callable[[], bool], command: Sequence[str], environment: dict[str, str], seconds: float = 850) -> None:
    """Run `command` with a Ray of its own until `ready`, then kill it and all that it has started, without a word."""
    own = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")} | environment
    told = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(command, env=own, start_new_session=True, stdout=told, stderr=told)
    try:
        end = time.monotonic() + seconds
        while not ready() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        told.seek(0)
        assert process.poll() is None and ready(), f"it ended before it could be killed: {told.read().decode()[-3000:]}"
    finally:
        told.close()
        started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for one in started:  # workers of Ray, in groups of their own: they end when they miss it, and may write until then
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(started, timeout=120)


def until(holds: Callable[[], object], seconds: float = 120) -> None:
    """Wait until `holds()` is true, at most `seconds`; fail then."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(0.02)
