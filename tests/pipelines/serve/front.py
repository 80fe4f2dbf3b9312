"""The front without Serve, in this process, and replicas that answer what a test says."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from starlette.testclient import TestClient

from pipelines.serve.admission import Admission
from pipelines.serve.body_readers import BodyReaders
from pipelines.serve.ingress import Ingress, api
from pipelines.serve.messages import Answer, AppArgs, Generation
from pipelines.serve.middleware import Limits, RequestMiddleware
from pipelines.serve.relay import Relay
from pipelines.serve.replica_states import ReplicaStates

INFO = {"label": "plain", "version": None, "base": "b", "context_limit": 9, "configuration": "c", "in_flight": 2, "running": 1,
        "slots": 8, "failed": False, "rejected": None, "heads": {}, "tried": {}, "at": 0.0}
ANSWER = Answer("g", "yes", (5,), "stop", 1, 0, 0, 0, 0.1)


class Call:
    """One call: `found`, an exception, or one that never ends."""

    def __init__(self, found: Any) -> None:
        self.found, self.cancelled = found, False

    async def _get(self) -> Any:
        if self.found is ...:
            await asyncio.Event().wait()
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def __await__(self) -> Any:
        return self._get().__await__()

    async def __anext__(self) -> Any:
        found = await self._get()
        self.found = StopAsyncIteration()
        return found[0] if isinstance(found, list) else found

    def __aiter__(self) -> Call:
        return self

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment's handle, whose calls find `found`, one after the other, the last one for ever."""

    def __init__(self, *found: Any) -> None:
        self.found, self.calls = list(found), list[Call]()
        self.asked: list[Generation] = []
        self.answers = self.stream = SimpleNamespace(remote=self._call)

    def options(self, stream: bool) -> Handle:
        return self

    def _call(self, generation: Generation) -> Call:
        self.asked.append(generation)
        self.calls.append(Call(self.found.pop(0) if len(self.found) > 1 else self.found[0]))
        return self.calls[-1]


def made_front(monkeypatch: pytest.MonkeyPatch, handle: Handle, infos: Any = (INFO,), keys: tuple[str, ...] = (),
               **changes: Any) -> tuple[TestClient, list[int]]:
    """A client of the front, and the statuses that it counts. `infos`: of each running replica; `changes`: of `AppArgs`."""
    front, counted, states = object.__new__(Ingress), list[int](), ReplicaStates()
    states.update({str(number): info for number, info in enumerate(infos)})
    front.args, front.states, front.admission = AppArgs({}, "", None, "plain", **changes), states, Admission()
    front.relay, front.model = Relay(handle, states, front.args.request_seconds), None  # type: ignore[arg-type]
    here = SimpleNamespace(servable_object=front, replica_id=SimpleNamespace(unique_id="front"))
    monkeypatch.setattr(serve, "get_replica_context", lambda: here)
    limits = Limits(BodyReaders(9, 5.0, 2**20), keys, count=lambda route, status, seconds: counted.append(status))
    monkeypatch.setattr(RequestMiddleware, "limits", limits)
    client = TestClient(api, raise_server_exceptions=False)
    client.front = front  # type: ignore[attr-defined]
    return client, counted
