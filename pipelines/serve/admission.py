"""Which requests the front accepts: as many answers at once as its replicas and their queue hold, and none once it is closing."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.serve.messages import AppArgs
from pipelines.serve.openai.errors import closing, queue_full

SPARE_REQUESTS = 64
"""Requests that the front accepts beyond answers and bodies, to answer them with 429, or to report health."""
RATE_SECONDS = 60.0
"""The time over which the rate of answers is measured."""
LONGEST_RETRY = 60
"""Seconds after which a refused client may ask again at the latest."""


def bodies_at_once(args: AppArgs) -> int:
    """Bodies that the front reads at once: as many as may be accepted, with a few that will be refused."""
    return args.room * max(args.replicas, args.max_replicas or 0) + SPARE_REQUESTS


class Admission:
    """Counts answers. `in_flight`: accepted ones that are not finished; `closing`: no more are accepted."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.in_flight, self.closing = 0, False
        self._clock = clock
        self._finished: deque[tuple[float, int]] = deque()

    def check_open(self) -> None:
        """Raise ApiError 503 once the application is being stopped."""
        if self.closing:
            raise closing()

    @contextmanager
    def slots(self, count: int, room: int, decoding: int) -> Iterator[None]:
        """Hold room for `count` answers. `room`: answers that the running replicas and their queue hold; `decoding`: those that
        they decode at once. Raises ApiError 429 when there is no room."""
        if self.in_flight + count > room:
            raise queue_full(self.in_flight, self.retry_seconds(decoding))
        self.in_flight += count
        try:
            yield
        except BaseException:
            self.in_flight -= count
            raise
        self.in_flight -= count
        self._finished.append((self._clock(), count))
        self._forget()

    def retry_seconds(self, decoding: int) -> int:
        """Seconds until what waits now has been answered, at the rate of the last minute: 1 where nothing was answered yet."""
        self._forget()
        if not self._finished:
            return 1
        rate = sum(count for _, count in self._finished) / max(1.0, self._clock() - self._finished[0][0])
        return max(1, min(LONGEST_RETRY, math.ceil((self.in_flight - decoding) / rate)))

    def _forget(self) -> None:
        """Drop the answers from before the last minute."""
        oldest = self._clock() - RATE_SECONDS
        while self._finished and self._finished[0][0] < oldest:
            self._finished.popleft()
