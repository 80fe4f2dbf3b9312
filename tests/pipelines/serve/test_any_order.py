"""Requests, clients that leave, other heads, engines that fail and replicas that die, in any order: every request ends, an answer
is that of plain decoding, and nothing is held in the end. The front and the replicas are real; only Serve between them is not."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from ray.exceptions import RayActorError

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, naive_generate, save_configuration
from hydra_core.sampling import Request, choices
from pipelines.serve.ingress import Ingress, api
from pipelines.serve.messages import AppArgs, Generation
from pipelines.serve.replica import DecodeServer
from pipelines.serve.replica_states import ReplicaStates
from pipelines.serve.user_config import heads_of
from tests.pipelines.serve.front import made_front

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:coroutine .*__del__")]
PROMPTS = ("a b a b a b", "hello", "once upon a time")
REPLICAS = ("0", "1")
QUIET_SECONDS = 0.005


class Running:
    """A call to a replica, as a handle gives it: awaited for the whole, or gone through item by item."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._found: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(items))

    async def _run(self, items: AsyncIterator[Any]) -> None:
        try:
            async for item in items:
                self._found.put_nowait(item)
        finally:
            await items.aclose()  # type: ignore[attr-defined]
        self._found.put_nowait(StopAsyncIteration())

    def cancel(self) -> None:
        self._task.cancel()

    def die(self) -> None:
        """The replica is gone, with all that it did."""
        self._task.cancel()
        self._found.put_nowait(RayActorError())

    async def __anext__(self) -> Any:
        found = await self._found.get()
        if isinstance(found, Exception):
            self._found.put_nowait(found)
            raise found
        return found

    def __aiter__(self) -> Running:
        return self

    def __await__(self) -> Any:
        return self.__anext__().__await__()


class Replicas:
    """The handle to replicas that run here. `calls`: of each."""

    def __init__(self, states: ReplicaStates) -> None:
        self.servers: dict[str, DecodeServer] = {}
        self.calls: dict[str, list[Running]] = {name: [] for name in REPLICAS}
        self.states, self._turn = states, 0
        self.answers, self.stream = (SimpleNamespace(remote=functools.partial(self._call, whole)) for whole in (True, False))

    def options(self, stream: bool) -> Replicas:
        return self

    def _call(self, whole: bool, generation: Generation) -> Running:
        usable = [name for name in self.servers if self.states.usable(name)] or list(self.servers)
        self._turn += 1
        name = usable[self._turn % len(usable)]
        call = Running(_once(self.servers[name].answers(generation)) if whole else self.servers[name].stream(generation))
        self.calls[name].append(call)
        return call

    def kill(self, name: str) -> None:
        loop = self.servers.pop(name).engine_loop
        for call in self.calls[name]:
            call.die()
        self.calls[name] = []
        self.states.forget(name)
        assert loop is not None
        loop.close()


async def _once(call: Awaitable[Any]) -> AsyncIterator[Any]:
    yield await call


@dataclass
class Asked:
    """A request. `alone`: nothing else was being answered when it came; `fault`: how many faults there were by then."""

    body: dict[str, Any]
    task: asyncio.Task[httpx.Response]
    alone: bool
    fault: int
    left: bool = False


class Endpoint(RuleBasedStateMachine):
    """An application of two replicas, and everything that may happen to it."""

    make: Callable[[], tuple[Any, Replicas]]
    args: AppArgs
    base: Base
    configurations: dict[str, str | None]

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.front, self.replicas = type(self).make()
        self.faults, self.pending = 0, list[Asked]()
        for name in REPLICAS:
            self.start(name)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=api, raise_app_exceptions=False), base_url="http://x")

    def do(self, work: Awaitable[Any]) -> Any:
        return self.loop.run_until_complete(work)  # type: ignore[arg-type]

    def start(self, name: str) -> None:
        server = DecodeServer(self.args)
        server.name = name
        self.do(server.reconfigure(heads_of(self.args)))
        self.replicas.servers[name] = server
        self.tell()

    def tell(self) -> None:
        """What Serve's controller does every second."""
        servers = self.replicas.servers
        self.front.states.update({name: self.do(server.record_routing_stats()) for name, server in servers.items()})

    @rule(prompt=st.sampled_from(PROMPTS), tokens=st.integers(1, 40), temperature=st.sampled_from([0.0, 1.0]),
          seed=st.integers(0, 2), stream=st.booleans(), n=st.integers(1, 2))
    def asks(self, prompt: str, tokens: int, temperature: float, seed: int, stream: bool, n: int) -> None:
        body = {"model": self.args.app_name, "prompt": prompt, "max_tokens": tokens, "temperature": temperature, "seed": seed,
                "stream": stream, "n": n}
        armed = any("_step" in vars(server.engine_loop.engine) or server.failed  # type: ignore[union-attr]
                    for server in self.replicas.servers.values())
        task = self.loop.create_task(self.client.post("/v1/completions", json=body, timeout=None))
        open_ones = [one for one in self.pending if not one.task.done()]
        self.pending.append(Asked(body, task, not open_ones, self.faults - armed))

    @rule(turns=st.integers(1, 10))
    def waits(self, turns: int) -> None:
        async def pass_time() -> None:
            for _ in range(turns):
                await asyncio.sleep(QUIET_SECONDS)

        self.do(pass_time())
        self.tell()

    @precondition(lambda self: self.pending)
    @rule(number=st.integers(0, 9))
    def leaves(self, number: int) -> None:
        one = self.pending[number % len(self.pending)]
        one.left = one.left or one.task.cancel()

    @rule(name=st.sampled_from(REPLICAS), heads=st.sampled_from(["plain", "ngram", "broken"]))
    def swaps(self, name: str, heads: str) -> None:
        server = self.replicas.servers[name]
        before = server.heads
        self.do(server.reconfigure({"configuration": self.configurations[heads], "label": heads}))
        if heads == "broken" or server.failed:
            assert server.heads == before and (server.rejected is not None or server.failed)
        else:  # a failure may come between
            assert server.rejected is not None or (server.heads is not None and server.heads.label == heads)
        self.tell()

    @rule(name=st.sampled_from(REPLICAS))
    def fails(self, name: str) -> None:
        """The next step of its engine raises; a second one within a minute ends the engine for good."""
        loop = self.replicas.servers[name].engine_loop
        assert loop is not None
        engine = loop.engine
        self.faults += 1

        def broken() -> None:
            vars(engine).pop("_step", None)
            raise RuntimeError("out of memory")

        engine._step = broken  # type: ignore[method-assign, assignment]

    @rule(name=st.sampled_from(REPLICAS))
    def dies(self, name: str) -> None:
        self.faults += 1
        self.replicas.kill(name)
        self.do(asyncio.sleep(QUIET_SECONDS))  # the other one gets what it leaves
        self.start(name)

    def teardown(self) -> None:
        """The endpoint is stopped: it accepts nothing more, and finishes what it accepted."""
        if not hasattr(self, "client"):
            return
        try:
            self._drain()
        finally:
            for name in list(self.replicas.servers):
                self.replicas.kill(name)
            self.do(asyncio.sleep(QUIET_SECONDS))
            self.loop.close()

    def _drain(self) -> None:
        self.do(asyncio.sleep(QUIET_SECONDS))  # those that came are accepted
        self.do(self.front.close())
        refused = self.do(self.client.post("/v1/completions", json={"model": self.args.app_name, "prompt": "x"}))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "closing")
        tasks = [one.task for one in self.pending]
        if tasks:
            _, late = self.do(asyncio.wait(tasks, timeout=120))
            assert not late
        for one in self.pending:
            if not one.left:
                self._check(one)
        self.do(asyncio.sleep(QUIET_SECONDS))
        assert self.front.admission.in_flight == 0
        for server in self.replicas.servers.values():
            self._check_rest(server)

    def _check_rest(self, server: DecodeServer) -> None:
        """Nothing decodes, waits or is held. The thread of the engine may be in the last step of a request that was left."""
        loop = server.engine_loop
        assert loop is not None
        for _ in range(2000):
            if server.failed or not (loop.engine.has_work or server.in_flight):
                break
            self.do(asyncio.sleep(QUIET_SECONDS))
        assert server.in_flight == 0 and (server.failed or not loop.engine.has_work)
        assert server.failed or (loop.engine.running == loop.engine.waiting == 0 and not loop._outputs)

    def _check(self, one: Asked) -> None:
        answer = one.task.result()
        faultless = one.fault == self.faults
        if answer.status_code != 200:
            code = answer.json()["error"]["code"]
            assert (answer.status_code, code) in ((429, "queue_full"), (503, "not_ready"), (503, "closing")), answer.text
            assert code != "queue_full" or not one.alone
            assert code != "not_ready" or not faultless, answer.text
            return
        texts, fault = self._texts(one.body, answer)
        wanted = self._wanted(one.body)
        if fault is not None:
            assert not faultless and fault["code"] == "not_ready", fault
            assert all(whole.startswith(text) for whole, text in zip(wanted, texts, strict=True))
        else:
            assert texts == wanted

    @staticmethod
    def _texts(body: dict[str, Any], answer: httpx.Response) -> tuple[list[str], dict[str, Any] | None]:
        """The text of each choice, and the error that cut a stream off."""
        if not body["stream"]:
            return [choice["text"] for choice in sorted(answer.json()["choices"], key=lambda one: one["index"])], None
        texts, fault = [""] * body["n"], None
        *events, last = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert last == "[DONE]"
        for event in map(json.loads, events):
            fault = event.get("error", fault)
            for choice in event.get("choices", ()):
                texts[choice["index"]] += choice["text"]
        return texts, fault

    def _wanted(self, body: dict[str, Any]) -> list[str]:
        return wanted_texts(self.base, body["prompt"], body["max_tokens"], body["temperature"], body["seed"], body["n"])


@functools.cache
def wanted_texts(base: Base, prompt: str, tokens: int, temperature: float, seed: int, n: int) -> list[str]:
    assert base.tokenizer is not None
    request = Request("x", tuple(base.tokenizer(prompt).input_ids), tokens, temperature=temperature, seed=seed)
    return [base.decode(naive_generate(base, one).token_ids) for one in choices(request, n)]


def test_every_request_ends_and_nothing_is_held(monkeypatch: pytest.MonkeyPatch, tiny_base_dir: Path, tiny_base: Base,
                                                tmp_path: Path) -> None:
    args = AppArgs({"model": str(tiny_base_dir), "dtype": "fp32"}, str(tmp_path / "cache"), None, "plain", threads=1,
                   max_batch_size=2, max_queued=3, max_new_tokens=64)
    save_configuration(tmp_path / "ngram", DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    (tmp_path / "broken").mkdir()

    def make() -> tuple[Ingress, Replicas]:
        replicas = Replicas(ReplicaStates())
        client, _ = made_front(monkeypatch, replicas, max_batch_size=2, max_queued=3, max_new_tokens=64)  # type: ignore[arg-type]
        front: Ingress = client.front  # type: ignore[attr-defined]
        replicas.states = front.states
        return front, replicas

    Endpoint.make, Endpoint.args, Endpoint.base = staticmethod(make), args, tiny_base  # type: ignore[method-assign]
    Endpoint.configurations = {"plain": None, "ngram": str(tmp_path / "ngram"), "broken": str(tmp_path / "broken")}
    run_state_machine_as_test(Endpoint, settings=settings(max_examples=12, stateful_step_count=16, deadline=None,
                                                          report_multiple_bugs=False, suppress_health_check=list(HealthCheck)))
