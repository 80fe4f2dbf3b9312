"""Who is asked: a full queue means wait, a bad row comes back as one, and nobody is waited for without end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError

from hydra_core.errors import InputError, StoppedError
from pipelines.batch.backend import Backend, RequestSettings
from pipelines.batch.backends import open_backend
from pipelines.batch.deployment import Deployment, DeploymentBackend, Embedded
from pipelines.batch.endpoint import ask_endpoint
from pipelines.batch.openai_format import row_seed
from pipelines.batch.reader import BatchRow
from pipelines.batch.retry import Overloaded, TooSlow
from pipelines.serve.messages import Answer, Generation, Refusal
from pipelines.serve.model_identity import ModelDigest
from tests.pipelines.serve.test_ingress import Handle as FrontHandle
from tests.pipelines.serve.test_ingress import ask  # noqa: F401

ANSWER = {"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}


class Handle:
    """A deployment handle that gives or raises what stands in `script`, then answers."""

    def __init__(self, *script: object) -> None:
        self.script, self.cancelled = list(script), 0
        self.asked: list[Generation] = []
        self.answers = SimpleNamespace(remote=self._remote)

    def _remote(self, generation: Generation) -> Any:
        self.asked.append(generation)

        def result(timeout_s: float) -> Any:
            found = self.script.pop(0) if self.script else [Answer(generation.id, "x", (5, 6), "stop", 3, 1, 1, 1, 0.1)]
            if isinstance(found, Exception):
                raise found
            return found

        return Flying(result, self)


class Flying:
    """A request in flight."""

    def __init__(self, result: Any, handle: Any) -> None:
        self.result, self.handle = result, handle

    def cancel(self) -> None:
        self.handle.cancelled += 1


def test_after_a_stop_nothing_is_asked_and_what_flies_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was sent in the moment of the stop too, and those after one that cannot be cancelled."""
    handle = Handle()
    backend = through(monkeypatch, handle)
    assert isinstance(backend, DeploymentBackend)

    def stopped_meanwhile(generation: Generation) -> Flying:
        backend.replicas.stop()
        return handle._remote(generation)

    handle.answers.remote = stopped_meanwhile
    assert backend.replicas.answers(Generation("a", 1), 1.0) and handle.cancelled == 1
    with pytest.raises(Overloaded, match="the job has ended"):
        backend.replicas.answers(Generation("b", 1), 1.0)
    assert len(handle.asked) == 1

    class Unreachable(Flying):
        def cancel(self) -> None:
            super().cancel()
            raise RuntimeError("no router")

    backend = through(monkeypatch, handle := Handle())
    assert isinstance(backend, DeploymentBackend) and isinstance(backend.replicas, Deployment)
    backend.replicas._flying.update(Unreachable(None, handle) for _ in range(3))
    backend.stop()
    assert handle.cancelled == 3
    backend, handle.script = through(monkeypatch, handle), [TimeoutError()]
    assert isinstance(backend, DeploymentBackend)
    handle.answers.remote = lambda _: Unreachable(handle._remote(Generation("c", 1)).result, handle)
    with pytest.raises(TooSlow, match="no answer in 1 s"):
        backend.replicas.answers(Generation("c", 1), 1.0)


def test_an_engine_of_this_process_is_asked_nothing_after_a_stop() -> None:
    """Nor is it made again."""
    engine = object.__new__(Embedded)
    engine.loop, engine._restarting, engine._flying, engine._stopped = asyncio.new_event_loop(), threading.Lock(), set(), False
    threading.Thread(target=engine.loop.run_forever, daemon=True).start()
    made: list[str] = []

    async def answers(generation: Generation) -> list[Answer]:
        made.append(generation.id)
        return []

    async def restart() -> None:
        made.append("restart")

    engine.server = SimpleNamespace(failed=True, answers=answers, restart=restart)  # type: ignore[assignment]
    assert engine.answers(Generation("a", 1), 20.0) == [] and made == ["restart", "a"]
    engine.stop()
    with pytest.raises(Overloaded, match="the job has ended"):
        engine.answers(Generation("b", 1), 20.0)
    assert made == ["restart", "a"]
    engine.loop.call_soon_threadsafe(engine.loop.stop)


class Clock:
    """Seconds that pass only where somebody waits."""

    def __init__(self, backend: Backend) -> None:
        self.now, self.pauses = 0.0, list[float]()
        backend.retry_policy.clock, backend.retry_policy.pause = lambda: self.now, self.pause

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def through(monkeypatch: pytest.MonkeyPatch, handle: Handle, **settings: Any) -> Backend:
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *_: handle)
    backend = open_backend(RequestSettings("app", 8, 0.0, 0, app_name="app", **settings))
    Clock(backend)
    return backend


def test_a_full_queue_and_a_dead_replica_mean_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = [RayActorError(), NodeDiedError("m"), ObjectLostError("00" * 28, None, ""), TaskCancelledError()]
    handle = Handle(Refusal(429, "full"), BackPressureError(num_queued_requests=1, max_queued_requests=1), *lost)
    reply = through(monkeypatch, handle).ask(BatchRow("a", 1, prompt="x"))
    assert (reply.status, reply.columns["tokens"], reply.body) == (200, 2, None)
    assert len({generation.id for generation in handle.asked}) == 3 + len(lost)  # each under an id of its own
    assert all(generation.id.startswith("batch-a-") for generation in handle.asked)


def test_a_fault_is_tried_again_and_a_failed_replica_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = RayTaskError("answers", "pages", RuntimeError("out of memory"), "title", 1, "ip")
    handle = Handle(fault, Refusal(503, "its engine has failed"), Refusal(503, "its engine has failed"), fault)
    assert through(monkeypatch, handle).ask(BatchRow("a", 1, prompt="x")).status == 200
    handle = Handle(*[fault, Refusal(503, "failed")] * 5)
    reply = through(monkeypatch, handle).ask(BatchRow("a", 1, prompt="x"))
    assert reply.status == 500 and "the server failed 3 times" in reply.message and len(handle.asked) == 5


def test_a_row_that_breaks_the_server_breaks_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault takes all that is in flight with it; the row that causes it fails, and no other."""
    lock, flying = threading.Lock(), set[str]()
    broken: set[str] = set()

    class Server:
        def remote(self, generation: Generation) -> Any:
            with lock:
                flying.add(generation.id)
                if generation.id.startswith("batch-poison"):
                    broken.update(flying)

            def result(timeout_s: float) -> list[Answer]:
                threading.Event().wait(0.01)
                with lock:
                    flying.discard(generation.id)
                    fails = generation.id in broken
                if fails:
                    raise RayTaskError("answers", "pages", RuntimeError("out of memory"), "title", 1, "ip")
                return [Answer(generation.id, "x", (5, 6), "stop", 3, 1, 1, 1, 0.1)]

            return Flying(result, self)

    backend = through(monkeypatch, SimpleNamespace(answers=Server()))  # type: ignore[arg-type]
    rows = [BatchRow(f"{'poison' if number in (3, 17) else 'row'}-{number}", number, prompt="x") for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(backend.ask, rows))
    assert [row.row for row, reply in zip(rows, replies, strict=True) if reply.status != 200] == [3, 17]


def test_nobody_is_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times `batch.row_seconds` without an answer to any row end the job, whether the backend is away or hangs."""
    with pytest.raises(StoppedError, match="the deployment: has answered nothing for 2400 s") as caught:
        through(monkeypatch, Handle(*[RayActorError()] * 999)).ask(BatchRow("a", 1, prompt="x"))
    assert "\n" not in str(caught.value)
    handle = Handle()
    backend = through(monkeypatch, handle, row_seconds=700.0)
    clock, others = Clock(backend), [True]

    def result(timeout_s: float) -> Any:
        clock.now += timeout_s
        if others[0]:
            backend.retry_policy.last_answer = clock.now
        raise TimeoutError

    handle.answers.remote = lambda _: Flying(result, handle)
    reply = backend.ask(BatchRow("b", 2, prompt="x"))  # others are answered meanwhile: this row alone is an error
    assert (reply.status, handle.cancelled, clock.now) == (504, 3, 2100.0) and "batch.row_seconds" in reply.message
    others[0] = False
    assert backend.ask(BatchRow("c", 3, prompt="x")).status == 504
    with pytest.raises(StoppedError, match=r"has answered nothing for 2800 s \(no answer in 700 s\)"):
        backend.ask(BatchRow("d", 4, prompt="x"))


def test_a_row_waits_for_room_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """While other rows are answered, one that never finds room becomes an error row."""
    backend = through(monkeypatch, Handle(*[Refusal(429, "full")] * 9999), row_seconds=60.0)
    clock = Clock(backend)
    backend.retry_policy.pause = lambda seconds: (clock.pause(seconds), setattr(backend.retry_policy, "last_answer", clock.now))
    reply = backend.ask(BatchRow("a", 1, prompt="x"))
    assert (reply.status, max(clock.pauses)) == (504, 5.0) and 180 < clock.now <= 190


def test_openai_rows_through_the_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Handle()
    backend = through(monkeypatch, handle)
    chat = {"model": "app", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7, "temperature": 0.5, "stream": True}
    reply = backend.ask(BatchRow("a", 1, url="/v1/chat/completions", body=chat))
    assert reply.body is not None and reply.body["choices"][0]["message"]["content"] == "x"
    asked = handle.asked[0]
    assert (asked.max_new_tokens, asked.temperature, asked.seed, asked.messages) == (7, 0.5, row_seed(0, "a"), chat["messages"])
    reply = backend.ask(BatchRow("b", 2, url="/v1/completions", body={"prompt": "raw"}))
    assert reply.body is not None and reply.body["choices"][0]["text"] == "x" and handle.asked[1].text == "raw"
    assert handle.asked[1].max_new_tokens == 8  # what a body leaves out is the job's
    for url, body, status, word in (("/v1/completions", {"prompt": ""}, 400, "empty"), ("/v1/completions", {}, 400, "prompt"),
                                    ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
                                    ("/v1/chat/completions", {"messages": [{}]}, 400, "messages"),
                                    ("/v1/chat/completions", chat | {"model": "gpt"}, 404, "does not exist"),
                                    ("/v1/chat/completions", chat | {"tools": [{}]}, 400, "tools")):
        reply = backend.ask(BatchRow("c", 3, url=url, body=body))
        assert reply.status == status and word in reply.message and reply.body is not None and "error" in reply.body
    assert len(handle.asked) == 2


@contextmanager
def endpoint(*script: tuple[int, Any]) -> Iterator[tuple[str, list[tuple[str, dict[str, str], Any]]]]:
    """A server that gives what stands in `script`, then answers; the requests that came."""
    left, came = list(script), list[tuple[str, dict[str, str], Any]]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/ready" and left:
                return self._give(*left.pop(0))
            self._give(200, {"data": [{"id": "app"}]} if self.path == "/v1/models" else [])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            came.append((self.path, dict(self.headers), body))
            self._give(*(left.pop(0) if left else (200, ANSWER)))

        def _give(self, status: int, value: Any) -> None:
            raw = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", came
    finally:
        server.shutdown()
        server.server_close()


def test_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_TEST_KEY", "secret")
    error = {"error": {"message": "too long"}}
    with endpoint((429, {}), (503, {}), (200, ANSWER), (400, error), (500, {}), (200, ANSWER), (200, {}), *[(500, {})] * 3) as (
            address, came):
        backend = open_backend(RequestSettings("app", 8, 0.0, 3, address=address, key_variable="BATCH_TEST_KEY"))
        Clock(backend)
        reply = backend.ask(BatchRow("a", 1, prompt="hi"))
        assert (reply.status, reply.columns["text"], reply.columns["tokens"], reply.columns["steps"]) == (200, "hello", 2, None)
        path, headers, body = came[-1]
        assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret") and len(came) == 3
        assert body == {"model": "app", "max_tokens": 8, "temperature": 0.0, "seed": row_seed(3, "a"),
                        "messages": [{"role": "user", "content": "hi"}]}
        reply = backend.ask(BatchRow("b", 2, prompt_ids=[1, 2]))
        assert (reply.status, reply.message, reply.body) == (400, "too long", error)
        assert came[-1][0] == "/v1/completions" and came[-1][2]["prompt"] == [1, 2]
        own = {"messages": [], "model": "other", "seed": 9, "stream": True}
        assert backend.ask(BatchRow("c", 3, url="/v1/chat/completions", body=own)).status == 200
        assert came[-1][2] == {"messages": [], "model": "other", "seed": 9, "max_tokens": 8}  # as through the handle
        assert backend.ask(BatchRow("d", 4, prompt="x")).message.startswith("the endpoint's answer is not in OpenAI's format")
        assert backend.ask(BatchRow("e", 5, prompt="x")).status == 500


def test_an_endpoint_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint() as (address, _):
        found = ask_endpoint(address, "app", {})  # not one of ours: no more is known
        assert (found.digest.base, found.names, found.ours) == ("app", ("app",), False)
        with pytest.raises(InputError, match="does not serve 'other', only app"):
            ask_endpoint(address, "other", {})
    with pytest.raises(StoppedError, match="no endpoint answers there"):
        ask_endpoint(address, "app", {})
    ours: dict[str, Any] = {"base": "b", "context_limit": 9, "configuration": "c"}
    with endpoint((503, {"status": "starting"}), (200, ours | {"fingerprint": "fp_1_2"}), (200, ours)) as (address, _):
        with pytest.raises(StoppedError, match="is not ready"):  # or it would pass for another configuration
            ask_endpoint(address, "app", {})
        found = ask_endpoint(address, "app", {})
        assert (found.digest.configuration, found.ours) == ("c", True)
        found = ask_endpoint(address, "app", {})  # of an earlier version: its answers say nothing of what made them
        assert (found.digest.configuration, found.ours) == ("c", False)
    monkeypatch.delenv("BATCH_TEST_KEY", raising=False)
    with pytest.raises(InputError, match="BATCH_TEST_KEY: that environment variable is not set"):
        open_backend(RequestSettings("app", 8, 0.0, 0, address=address, key_variable="BATCH_TEST_KEY"))


def test_our_endpoint_tells_the_fingerprint_that_its_answers_carry(ask: Any) -> None:  # noqa: F811
    info = ask(FrontHandle(...))[0].get("/ready").json()
    assert info["fingerprint"] == ModelDigest(info["base"], info["context_limit"], info["configuration"]).fingerprint


def test_rows_draw_apart_and_the_same_again() -> None:
    """With one seed for all rows, equal prompts would sample equal answers."""
    seeds = [row_seed(7, name) for name in ("a", "b", "c")]
    assert len({*seeds, 7}) == 4 and seeds == [row_seed(7, name) for name in ("a", "b", "c")]
    assert all(row_seed(8, name) != seed and 0 <= seed < 2**63 for name, seed in zip("abc", seeds, strict=True))
