"""How long rows wait for a backend: each row's attempts have a limit, and a backend that answers nobody ends the job."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from hydra_core.errors import StoppedError

LONGEST_PAUSE = 5.0    # seconds between two attempts while a queue is full
PATIENCE = 600.0       # seconds without any answer after which the backend counts as gone, at least
ROW_SECONDS = 600.0    # default limit of one attempt at a row
ALIVE = 60.0           # seconds since an answer to any row within which the backend counts as there, at most
TRIES = 3              # attempts at a row at which the server itself fails, or which it does not answer

Found = TypeVar("Found")


class Overloaded(Exception):
    """The server has no room now: try again after `seconds`; None: the caller chooses."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


class TooSlow(Exception):
    """An attempt at a row had no end within its limit, which is the one that the setting `limit` gives."""

    def __init__(self, why: str, limit: str = "batch.row_seconds") -> None:
        super().__init__(why)
        self.limit = limit


class GivenUp(Exception):
    """One row gets no answer while others do; the text says what was tried."""


class RetryPolicy:
    """Waits for a backend without room; shared by all threads. `backend`: its name in messages; `row_seconds`: the limit of one
    attempt. `patience`: seconds without any answer that end the job: more than all attempts at one row take, so that a row that
    hangs alone is an error and not the end of the job. `clock` (seconds) and `pause` (waits that many, or until `stop`) may be
    replaced by those of a test."""

    def __init__(self, backend: str, row_seconds: float = ROW_SECONDS) -> None:
        self.backend, self.row_seconds = backend, row_seconds
        self.patience = max(PATIENCE, (TRIES + 1) * row_seconds)
        self._ended = threading.Event()
        self.clock: Callable[[], float] = time.monotonic
        self.pause: Callable[[float], object] = self._ended.wait
        self.last_answer: float | None = None

    def stop(self) -> None:
        """Let no thread wait any longer."""
        self._ended.set()

    @property
    def stopped(self) -> bool:
        return self._ended.is_set()

    def wait(self, ask: Callable[[], Found]) -> Found:
        """The result of `ask`, called again while it raises Overloaded or TooSlow.

        Raises GivenUp when this row has used up its attempts, or the time for them while other rows are answered; StoppedError
        when no thread has had an answer for `patience` seconds, and after `stop`.
        """
        began, pause, slow, limit = self.clock(), 0.1, 0, "batch.row_seconds"
        if self.last_answer is None:
            self.last_answer = began
        while True:
            self._check_running()
            try:
                found = ask()
                self.last_answer = self.clock()
                return found
            except Overloaded as overloaded:
                why, seconds = str(overloaded), overloaded.seconds
            except TooSlow as hung:
                why, seconds, slow, limit = str(hung), 0.0, slow + 1, hung.limit
            now = self.clock()
            self._check_running()
            if now - self.last_answer > self.patience:
                raise StoppedError(f"{self.backend}: has answered nothing for {self.patience:.0f} s ({why}); a lower "
                                   "batch.row_seconds ends a job sooner. Run again when it answers; every row that was answered "
                                   "is kept")
            others = now - self.last_answer < min(ALIVE, self.row_seconds)
            if slow >= TRIES or (others and now - began > TRIES * self.row_seconds):
                raise GivenUp(f"no answer in {now - began:.0f} s ({why}); {limit} sets the limit")
            self.pause(min(pause if seconds is None else seconds, LONGEST_PAUSE))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _check_running(self) -> None:
        if self.stopped:
            raise StoppedError(f"{self.backend}: the job has ended")
