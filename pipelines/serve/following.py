"""The front's side of following the registry: when to look, what to tell of it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.config import RunConfig
from pipelines.serve.messages import AppArgs
from pipelines.serve.metrics import FrontMetrics
from pipelines.tracking.address import registry_uri, tracking_uri

FOLLOWER = "pipelines.serve.follower:Follower"
"""By its name, as Serve takes applications: the follower deploys the application, this front included."""
LATER_SECONDS = 5.0
"""Until the next look after one that no replica could follow."""
log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Follow:
    """What an application follows. `model`: as `serve.model`, None: the champion; `seconds`: between two looks, 0: webhooks alone
    lead to one; `storage`, `tracking`, `promote`: those settings, of which the first is where downloads go."""

    model: str | None
    seconds: float
    storage: str
    tracking: dict[str, Any]
    promote: dict[str, Any]

    @staticmethod
    def of(config: RunConfig) -> Follow | None:
        """What `config` asks for; None: nothing. The address of MLflow is that of this process: nodes may not have its
        variables."""
        if not config.serve.follows:
            return None
        tracking = config.tracking.model_dump() | {"uri": tracking_uri(config), "registry_uri": registry_uri(config)}
        promote = {name: getattr(config.promote, name) for name in ("model_name", "alias")}
        return Follow(config.serve.model, config.serve.follow_seconds, config.storage, tracking, promote)


class _Late:
    """The actor. MLflow's client is imported in its process alone."""

    def __init__(self, args: AppArgs) -> None:
        module, _, name = FOLLOWER.partition(":")
        self.follower = getattr(importlib.import_module(module), name)(args)

    def look(self) -> dict[str, Any]:
        found: dict[str, Any] = self.follower.look()
        return found


def follower_of(args: AppArgs) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Start the actor that looks; returns its `look`. It ends with this process, and is started again where it dies alone."""
    actor = ray.remote(_Late).options(num_cpus=0, max_restarts=-1, max_task_retries=0).remote(args)  # type: ignore[attr-defined]
    look: Callable[[], Awaitable[dict[str, Any]]] = actor.look.remote
    return look


class Following:
    """Looks at the registry every `seconds`, and at once when it is woken; `look` as `Follower.look`.

    `answers`: whether the registry answered the last look; None before the first one.
    """

    def __init__(self, look: Callable[[], Awaitable[dict[str, Any]]], seconds: float, metrics: FrontMetrics) -> None:
        self.answers: bool | None = None
        self._look, self._seconds, self._metrics = look, seconds, metrics
        self._woken = asyncio.Event()
        self._last = ""

    def wake(self) -> None:
        """Look now, or again after the look that is under way."""
        self._woken.set()

    async def run(self) -> None:
        """Look for ever."""
        if not self._seconds:
            await self._woken.wait()
        while True:
            self._woken.clear()
            try:
                found = await self._look()
            except Exception as error:  # the actor has died, and is being started again
                found = {"outcome": "silent", "version": None, "why": str(error).splitlines()[0] if str(error) else "no actor"}
            self._tell(found)
            later = found["outcome"] == "later"
            wait = LATER_SECONDS if later else self._seconds or None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), wait)

    def _tell(self, found: dict[str, Any]) -> None:
        """One log line for each change, and one for each outage, however long."""
        outcome, why = found["outcome"], found["why"]
        self.answers = outcome != "silent"
        if outcome in ("changed", "rejected"):
            self._metrics.followed(outcome)
        if outcome == "changed":
            log.info("the registry names other heads, which decode now", extra={"version": found["version"]})
        elif outcome == "rejected":
            log.error(f"the registry names heads that are rejected, the earlier ones stay: {why}",
                      extra={"version": found["version"]})
        elif outcome != self._last and outcome == "later":
            log.warning(f"the registry names other heads, which no replica could take yet: {why}")
        elif outcome != self._last and outcome != "same":
            log.warning(f"the registry does not say what to decode with, the present heads stay: {why}")
        elif self._last == "silent" and outcome != "silent":
            log.info("the registry answers again")
        self._last = outcome
