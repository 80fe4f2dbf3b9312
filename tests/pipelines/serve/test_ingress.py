"""What the front makes of replicas that are starting, full, failing or gone: never a hang, a trace or a wrong status."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.testclient import TestClient

from pipelines.serve.ingress import Ingress, api
from pipelines.serve.instance import together
from pipelines.serve.messages import AppArgs, Refusal
from pipelines.serve.middleware import Limits, RequestMiddleware

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .*__del__")  # Serve's wrapper around a front that no Serve made
INFO = {"label": "plain", "version": None, "base": "b", "context_limit": 9, "configuration": "c", "in_flight": 2, "running": 1,
        "slots": 8, "failed": False, "rejected": None}
BODY = {"model": "hydra-heads", "prompt": "x"}
GONE = DeploymentUnavailableError(DeploymentID("DecodeServer", "hydra-heads"))


class Handle:
    """A deployment's handle: `infos`, or an exception, for a question to all; `fault` for whatever is to be answered."""

    def __init__(self, infos: Any, fault: Any = None) -> None:
        self.infos, self.fault, self.cancelled = infos, fault, False
        self.answers = SimpleNamespace(remote=lambda generation: self._answer())
        self.stream = SimpleNamespace(remote=lambda generation: self._items())

    def options(self, stream: bool) -> Handle:
        return self

    def broadcast(self, name: str) -> Any:
        async def results(timeout_s: float, return_exceptions: bool) -> Any:
            if isinstance(self.infos, Exception):
                raise self.infos
            return self.infos

        return SimpleNamespace(results_async=results)

    async def _answer(self) -> Any:
        if isinstance(self.fault, Exception):
            raise self.fault
        return self.fault

    async def _items(self) -> Any:
        yield await self._answer()


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TestClient, list[int]]]:
    def make(handle: Handle, keys: tuple[str, ...] = ()) -> tuple[TestClient, list[int]]:
        front, counted = object.__new__(Ingress), list[int]()
        front.server, front.args, front.in_flight = handle, AppArgs({}, "", None, "plain"), 0
        monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=front))
        limits = Limits(2**20, keys, count=lambda route, status, seconds: counted.append(status))
        monkeypatch.setattr(RequestMiddleware, "limits", limits)
        return TestClient(api, raise_server_exceptions=False), counted

    return make


@pytest.mark.parametrize(("infos", "health", "status"), [
    ([INFO, INFO], 200, "ready"), ([INFO, RayActorError()], 200, "ready"), ([INFO, INFO | {"failed": True}], 503, "failed"),
    ([], 200, "starting"), ([RayActorError()], 200, "starting"), (GONE, 200, "starting"), (TimeoutError(), 200, "starting")])
def test_health_and_readiness_tell_the_truth(ask: Any, infos: Any, health: int, status: str) -> None:
    client, _ = ask(Handle(infos))
    assert client.get("/health").status_code == health
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()["status"]) == (200 if status == "ready" else 503, status)


def test_all_replicas_are_told_as_one(ask: Any) -> None:
    rejected = {"label": "bad", "reason": "missing"}
    found = together([INFO, INFO | {"configuration": "d", "rejected": rejected}])
    assert (found["in_flight"], found["running"], found["slots"], found["replicas"]) == (4, 2, 16, 2)
    assert found["configurations"] == ["c", "d"] and found["rejected"] == rejected
    client, _ = ask(Handle([INFO]), keys=("0" * 64,))
    assert client.get("/ready").json() == {"status": "ready"}  # a probe needs no key and learns no more


FAULTS = [(BackPressureError(num_queued_requests=1, max_queued_requests=1), 429, "queue_full"),
          (RayActorError(), 503, "not_ready"), (GONE, 503, "not_ready"),
          (Refusal(503, "its engine has failed"), 503, "not_ready"),
          (Refusal(400, "prompt: 9 tokens leave no room in a context of 8: shorten it"), 400, "context_length_exceeded"),
          (RuntimeError("secret path /x/y"), 500, None)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_have_a_status_and_no_trace(ask: Any, number: int, stream: bool) -> None:
    fault, status, code = FAULTS[number]
    client, counted = ask(Handle([INFO], fault))
    answer = client.post("/v1/completions", json=BODY | {"stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code) and counted == [status]
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    if status == 400:
        assert answer.json()["error"]["param"] == "prompt"


def test_what_is_wrong_with_a_body_is_told_by_its_field(ask: Any) -> None:
    client, _ = ask(Handle([INFO]))
    for body, param, word in ((b"{", None, "JSON"), (b'{"model": "hydra-heads", "prompt": {}}', "prompt", "prompt"),
                              (b'{"model": "hydra-heads", "prompt": "x", "echo": true}', "echo", "echo"),
                              (b'{"model": "hydra-heads", "prompt": "x", "stop": "' + b"s" * 40_000 + b'"}', "stop", "256")):
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param and word in answer.text
    chat = {"model": "hydra-heads", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}
    assert client.post("/v1/chat/completions", json=chat).json()["error"]["param"] == "top_logprobs"
