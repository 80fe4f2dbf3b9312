"""A running application, as whoever started it holds it: how it is stopped."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from ray import serve

from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line
from pipelines.serve.instance import FRONT, POLL_SECONDS, ask_front, running_instance

STAGE = "serve"
FRONT_SECONDS = 10.0
"""In which the front must answer while the application is stopped."""
REMOVED_SECONDS, CUT_SECONDS = 60.0, 5.0
"""The time that Serve has to remove an idle application, and one whose answers were not finished."""


@dataclass(frozen=True)
class ServedApp:
    """A running application. `url`: empty without HTTP; `alone`: Serve itself was started for it, and stops with it;
    `drain_seconds`: the time to finish what was accepted."""

    name: str
    url: str
    label: str
    alone: bool
    drain_seconds: float = 0.0

    def stop(self, hurry: threading.Event | None = None) -> None:
        """Accept nothing more, finish what was accepted (at most `drain_seconds`, and until `hurry`), and remove the application.

        Says what goes wrong and does not raise it: there is often an error already, for which the application is stopped.
        """
        drained = False
        try:
            drained = self._drain(hurry or threading.Event())
        except Exception as error:
            say(STAGE, f"{self.name} may have unfinished answers: {first_line(error)}")
        self.remove(CUT_SECONDS if not drained else REMOVED_SECONDS)

    def remove(self, seconds: float = CUT_SECONDS) -> None:
        """Remove the application with all that it is doing, and Serve where nobody needs it any more. Does not raise."""
        try:
            serve.delete(self.name, _blocking=False)  # its own wait ends in a TimeoutError after a minute
            end = time.monotonic() + seconds
            while self.name in serve.status().applications and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
            found = running_instance()
            if found is not None and self.name in found.applications:
                say(STAGE, f"{self.name} is still being removed")
            elif found is not None and not found.applications and (self.alone or found.url is None):
                serve.shutdown()
        except Exception as error:
            say(STAGE, f"{self.name} was not removed: {first_line(error)}")

    def _drain(self, hurry: threading.Event) -> bool:
        """Whether all answers that were accepted are finished."""
        left = serve.get_deployment_handle(FRONT, self.name).close.remote().result(timeout_s=FRONT_SECONDS)
        end = time.monotonic() + self.drain_seconds
        if left:
            say(STAGE, f"finishing {left} answers, for at most serve.drain_seconds={self.drain_seconds:g}; a second signal ends "
                       "that")
        while left:
            if time.monotonic() > end or hurry.wait(POLL_SECONDS):
                say(STAGE, f"{left} answers are cut off")
                return False
            left = ask_front(self.name, FRONT_SECONDS)["in_flight"]
        return True
