"""What the front makes of replicas that are starting, full, failing or gone: never a hang, a trace or a wrong status."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.testclient import TestClient

from pipelines.serve.messages import Refusal
from pipelines.serve.replica_states import together
from tests.pipelines.serve.front import ANSWER, INFO, Handle, made_front

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .*__del__")  # Serve's wrapper around a front that no Serve made
BODY = {"model": "hydra-heads", "prompt": "x"}
GONE = DeploymentUnavailableError(DeploymentID("DecodeServer", "hydra-heads"))


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[TestClient, list[int]]]:
    return partial(made_front, monkeypatch)


@pytest.mark.parametrize(("infos", "status"), [
    ([INFO, INFO], "ready"), ([INFO, {}], "ready"), ([INFO, INFO | {"failed": True}], "ready"),
    ([INFO | {"failed": True}], "failed"), ([], "starting"), ([{}], "starting")])
def test_readiness_is_told_from_memory_and_health_is_the_fronts(ask: Any, infos: Any, status: str) -> None:
    handle = Handle(...)
    client, _ = ask(handle, infos)
    assert client.get("/health").json() == {"status": "ok"}
    answer = client.get("/ready")
    assert (answer.status_code, answer.json()["status"]) == (200 if status == "ready" else 503, status)
    assert not handle.calls  # no replica is asked


def test_models_stay_known_while_no_replica_is_there(ask: Any) -> None:
    handle = Handle(...)
    client, _ = ask(handle)
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["base"], model["context_limit"], model["max_model_len"]) == ("hydra-heads", "b", 9, 9)
    client.front.states.update({})
    assert client.get("/ready").json() == {"status": "starting"}
    assert client.get("/v1/models").json()["data"] == [model] and client.get("/v1/models/hydra-heads").json() == model
    other = client.get("/v1/models/gpt-4o")
    assert other.status_code == 404 and other.json()["error"]["code"] == "model_not_found" and not handle.calls
    assert ask(Handle(...), [])[0].get("/v1/models").status_code == 503


def test_all_replicas_are_told_as_one(ask: Any) -> None:
    rejected = {"label": "bad", "reason": "missing"}
    found = together([INFO, INFO | {"configuration": "d", "rejected": rejected}])
    assert (found["in_flight"], found["running"], found["slots"], found["replicas"]) == (4, 2, 16, 2)
    assert found["configurations"] == ["c", "d"] and found["rejected"] == rejected
    assert not {"heads", "tried", "at"} & set(found)
    ready = ask(Handle(...))[0].get("/ready").json()
    assert (ready["in_flight"], ready["accepted"]) == (2, 0) and 0 <= ready["age_seconds"] < 60
    client, _ = ask(Handle(...), keys=("0" * 64,))
    assert client.get("/ready").json() == {"status": "ready"}  # a probe needs no key and learns no more


def test_a_closing_front_finishes_and_accepts_nothing(ask: Any) -> None:
    handle = Handle([ANSWER])
    client, _ = ask(handle)
    assert client.post("/v1/completions", json=BODY).status_code == 200
    assert asyncio.run(client.front.close()) == 0
    answer = client.post("/v1/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "closing") and int(answer.headers["retry-after"]) > 0
    assert (client.get("/ready").status_code, client.get("/ready").json()["status"]) == (503, "closing")
    assert client.get("/health").status_code == client.get("/v1/models").status_code == 200 and len(handle.calls) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", [Refusal(503, "its engine has failed", replica="0"), RayActorError()], ids=["refused", "died"])
def test_another_replica_is_tried_before_anything_is_out(ask: Any, first: Any, stream: bool) -> None:
    handle = Handle(first, [ANSWER])
    client, _ = ask(handle, [INFO, INFO])
    assert "yes" in client.post("/v1/completions", json=BODY).text or stream
    assert len(handle.calls) == 2 and handle.asked[0] == handle.asked[1]
    assert handle.calls[0].cancelled == isinstance(first, RayActorError)  # it may only be out of reach, and decode on
    assert client.front.states.usable("0") == isinstance(first, RayActorError)
    alone = Handle(first, [ANSWER])
    assert ask(alone, [INFO])[0].post("/v1/completions", json=BODY | {"stream": stream}).status_code == 503
    for end in (RayActorError(), Refusal(503, "the engine failed", in_flight=True)):
        deadly = Handle(end)  # a request that ends replicas does not end them all
        assert ask(deadly, [INFO] * 5)[0].post("/v1/completions", json=BODY | {"stream": stream}).status_code == 503
        assert len(deadly.calls) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_its_time(ask: Any, stream: bool) -> None:
    handle = Handle(...)
    client, counted = ask(handle, request_seconds=0.05)
    answer = client.post("/v1/completions", json=BODY | {"stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout") and "0.05 seconds" in answer.text
    assert handle.calls[0].cancelled and client.front.admission.in_flight == 0 and counted == [504]
    assert handle.asked[0].seconds == 0.05 and handle.asked[0].arrived is not None


def test_a_queue_is_as_long_as_the_replicas_that_are_there_need(ask: Any) -> None:
    handle = Handle([ANSWER])
    small: dict[str, Any] = dict(max_batch_size=2, max_queued=1, max_replicas=4)
    client, _ = ask(handle, [INFO], **small)
    client.front.admission.in_flight = 3
    full = client.post("/v1/completions", json=BODY)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    client.front.states.update({"0": INFO, "1": INFO})
    assert client.post("/v1/completions", json=BODY).status_code == 200


def test_wrong_paths_are_named(ask: Any) -> None:
    client, _ = ask(Handle(...))
    for method, path, status in (("GET", "/models", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/responses", 404)):
        answer = client.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == status and f"{method} {path}" in answer.json()["error"]["message"]
        assert "/v1/chat/completions" in answer.json()["error"]["message"]


FAULTS = [(BackPressureError(num_queued_requests=1, max_queued_requests=1), 429, "queue_full"),
          (RayActorError(), 503, "not_ready"), (GONE, 503, "not_ready"),
          (Refusal(503, "its engine has failed"), 503, "not_ready"),
          (Refusal(400, "prompt: 99 characters are more than the 8 tokens allowed here can hold: shorten it"), 400,
           "context_length_exceeded"),
          (Refusal(504, "not complete within 3 seconds"), 504, "timeout"),
          (Refusal(400, "prompt: 9 tokens leave no room in a context of 8: shorten it"), 400, "context_length_exceeded"),
          (RuntimeError("secret path /x/y"), 500, None)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_faults_have_a_status_and_no_trace(ask: Any, number: int, stream: bool) -> None:
    fault, status, code = FAULTS[number]
    client, counted = ask(Handle(fault))
    answer = client.post("/v1/completions", json=BODY | {"stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code) and counted == [status]
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert client.front.admission.in_flight == 0
    if status == 400:
        assert answer.json()["error"]["param"] == "prompt"


def test_what_is_wrong_with_a_body_is_told_by_its_field(ask: Any) -> None:
    client, _ = ask(Handle(...))
    for body, param, word in ((b"{", None, "JSON"), (b'{"model": "hydra-heads", "prompt": {}}', "prompt", "prompt"),
                              (b'{"model": "hydra-heads", "prompt": "x", "echo": true}', "echo", "echo"),
                              (b'{"model": "hydra-heads", "prompt": "x", "stop": "' + b"s" * 40_000 + b'"}', "stop", "256")):
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param and word in answer.text
    chat = {"model": "hydra-heads", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}
    assert client.post("/v1/chat/completions", json=chat).json()["error"]["param"] == "top_logprobs"
