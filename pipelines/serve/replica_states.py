"""What the replicas of an application tell of themselves, known in every process that sends them requests.

Serve's controller collects it (`DecodeServer.record_routing_stats`) and sends it to the routers with the list of running
replicas. Nobody who wants to know asks a replica, and a replica whose request slots are taken tells it all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

REPORT_SECONDS = 1.0
"""Between two reports of a replica."""
AVOIDED_SECONDS = 3.0
"""In which a replica that refused gets no request, where there is another one."""


class ReplicaStates:
    """The running replicas of one application. `replicas`: id -> what it told last, empty before its first report; `waiting`: the
    requests that wait here for a replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.replicas: dict[str, dict[str, Any]] = {}
        self.waiting: Callable[[], int] = lambda: 0
        self._clock = clock
        self._told: dict[str, float] = {}
        self._avoided: dict[str, float] = {}

    def update(self, replicas: dict[str, dict[str, Any]]) -> None:
        """Replace all that is known; a report that is not the last one again is new."""
        now, before = self._clock(), self.replicas
        self._told = {name: self._told.get(name, now) if info == before.get(name) else now for name, info in replicas.items()}
        self.replicas = replicas

    def forget(self, replica: str) -> None:
        """A replica that has just died, which Serve notices later."""
        self.replicas = {name: info for name, info in self.replicas.items() if name != replica}

    def avoid(self, replica: str | None) -> None:
        """A replica that has just refused: send requests to others for a while."""
        if replica is not None:
            self._avoided[replica] = self._clock() + AVOIDED_SECONDS

    def usable(self, replica: str) -> bool:
        """Whether a request sent there now has a chance."""
        return not self.replicas.get(replica, {}).get("failed", False) and self._avoided.get(replica, 0.0) <= self._clock()

    def infos(self) -> list[dict[str, Any]]:
        """What each replica that has told anything told last."""
        return [info for info in self.replicas.values() if info]

    def age(self) -> float:
        """Seconds since the oldest of these reports came."""
        now = self._clock()  # a report may come in another thread meanwhile
        return max((now - self._told.get(name, now) for name, info in list(self.replicas.items()) if info), default=0.0)


_OF: dict[str, ReplicaStates] = {}


def states_of(app_name: str) -> ReplicaStates:
    """The replicas of an application, as far as this process knows them: it has to hold a handle to them."""
    return _OF.setdefault(app_name, ReplicaStates())


def together(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The combined `info` of replicas: sums over all, a rejection by any, a failure of all, and the model of the first. During an
    update replicas differ: `configurations` lists all. Raises ValueError for no replica."""
    if not infos:
        raise ValueError("no replica has told anything")
    sums = {name: sum(info[name] for info in infos) for name in ("in_flight", "running", "slots")}
    rejected = next((info["rejected"] for info in infos if info["rejected"] is not None), None)
    first = {name: value for name, value in infos[0].items() if name not in ("heads", "tried", "at")}
    return first | sums | {"replicas": len(infos), "failed": all(info["failed"] for info in infos), "rejected": rejected,
                           "configurations": sorted({info["configuration"] for info in infos})}
