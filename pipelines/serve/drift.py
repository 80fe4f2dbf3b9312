"""Whether the traffic still is what the heads were chosen on: tokens per step of the last hour against the bench's own interval.

`promote` writes the interval beside the configuration. The bench measures greedy answers, one at a time, so steps of other
answers do not count: with more sequences in a batch the trees are smaller, and sampled tokens are harder to foretell.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hydra_core.storage import local_copy

FILE = "acceptance.json"
"""Of a configuration: tokens_per_step, low, high (95 %), questions."""
HOUR = 3600.0
MINUTE = 60.0
LEAST_STEPS = 500
"""Steps in the hour below which nothing is said: about ten answers."""
log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Drift:
    """The last hour. `tokens_per_step`: None where too few steps count; `low`: the least that the bench's interval has, None: it
    is not known."""

    tokens_per_step: float | None
    low: float | None

    @property
    def drifted(self) -> bool:
        """Whether the last hour is below the interval."""
        return self.tokens_per_step is not None and self.low is not None and self.tokens_per_step < self.low


def interval_low(configuration: str | None) -> float | None:
    """The lower end of the interval that was measured for a configuration; None where none was, or where it cannot be read."""
    if configuration is None:
        return None
    try:
        return float(json.loads((local_copy(configuration) / FILE).read_text(encoding="utf-8"))["low"])
    except Exception:  # an alarm that is not there is no reason to serve nothing
        return None


class DriftWatch:
    """Counts the steps of one replica, and says once when its last hour falls below the interval. Any thread may call it.

    `clock`: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._low: float | None = None
        self._minutes: deque[tuple[int, list[int]]] = deque()
        self._told = False
        self._lock = threading.Lock()

    def expect(self, low: float | None) -> None:
        """Other heads decode now, whose interval begins at `low`: the hour begins anew."""
        with self._lock:
            self._low, self._told = low, False
            self._minutes.clear()

    def step(self, tokens: int) -> None:
        """A step of a greedy answer that decoded alone gave so many tokens."""
        minute = int(self._clock() // MINUTE)
        with self._lock:
            if not self._minutes or self._minutes[-1][0] != minute:
                self._minutes.append((minute, [0, 0]))
            counts = self._minutes[-1][1]
            counts[0] += tokens
            counts[1] += 1

    def look(self) -> Drift:
        """The last hour, with a log line when it has just fallen below the interval."""
        oldest = int((self._clock() - HOUR) // MINUTE)
        with self._lock:
            while self._minutes and self._minutes[0][0] < oldest:
                self._minutes.popleft()
            tokens, steps = (sum(counts[place] for _, counts in self._minutes) for place in (0, 1))
            found = Drift(tokens / steps if steps >= LEAST_STEPS else None, self._low)
            fell, self._told = found.drifted and not self._told, found.drifted
        if fell:
            log.warning(f"a step gave {found.tokens_per_step:.2f} tokens in the last hour, and at least {found.low:.2f} when "
                        "these heads were measured: the traffic is of another kind; `hydra-heads loop` trains on it")
        return found
