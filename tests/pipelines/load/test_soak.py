"""A soak: what becomes of each request is told apart, memory is judged by its slope, and a failed check is told."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hydra_core.errors import InputError, StoppedError
from jobs.runner import run
from pipelines.config import load_config
from pipelines.load import soak, soak_chaos
from pipelines.load.client import Target
from pipelines.load.soak import Report, Soaked, judge, markdown, run_soak, soak_args, unjudged
from pipelines.load.soak_chaos import Chaos, Memory
from pipelines.load.soak_clients import FAILED, LEFT, LOST, OK, REFUSED, TOLD, WRONG, Clients, Question, Tally
from pipelines.serve.messages import AppArgs
from pipelines.serve.stage import resolve_args
from tests.pipelines.batch.stand_in import A, StandIn
from tests.pipelines.batch.test_any_order import untracked
from tests.pipelines.batch.test_backends import endpoint
from tests.pipelines.serve.test_instance import self_signed
from tests.pipelines.serve.test_stage import free_port

RIGHT = f"{A.base}: hi"


def events(*values: object) -> tuple[int, str, bytes]:
    return 200, "text/event-stream", "".join(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"
                                             for value in values).encode()


def piece(text: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}}]}


HELD = threading.Event()
REPLIES = [
    (False, None, None, OK), (True, events(piece(RIGHT[:3]), piece(RIGHT[3:]), "[DONE]"), None, OK),
    (True, events(piece("other"), "[DONE]"), None, WRONG), (True, events(piece(RIGHT)), None, FAILED),
    (True, events(piece("x"), {"error": {"message": "the replica died"}}, "[DONE]"), None, TOLD),
    (False, (429, "text/plain", b"full"), None, REFUSED), (True, (503, "application/json", b"{}"), None, REFUSED),
    (False, (500, "application/json", b"{}"), None, FAILED), (False, (200, "application/json", b"{"), None, FAILED),
    *[(stream, (200, "application/json", raw), None, FAILED) for stream in (False, True)
      for raw in (b"[1]", b'{"choices": []}', b'{"choices": 3}', b"null")],
    (False, "silence", 0.1, LEFT), (False, "silence", None, LOST)]


@pytest.mark.parametrize(("stream", "reply", "leave", "outcome"), REPLIES, ids=[f"{n} {row[3]}" for n, row in enumerate(REPLIES)])
def test_what_becomes_of_a_request(stream: bool, reply: object, leave: float | None, outcome: str) -> None:
    HELD.clear()

    async def one(address: str) -> Clients:
        target = Target(address, "hydra-heads", 8, {}, patience=0.4 if outcome == LOST else 20.0)
        async with Clients(target, [Question("hi", 8, RIGHT)], random.Random(0)) as clients:
            assert await clients.send(stream, leave) == outcome
            return clients

    with StandIn() as server:
        server.instead = lambda *_: (HELD.wait(20), None)[1] if reply == "silence" else reply  # type: ignore[assignment,return-value]
        try:
            tally = asyncio.run(one(server.address)).tally
        finally:
            HELD.set()
    assert tally.counts == {outcome: 1} and bool(tally.why) == (outcome in (WRONG, FAILED, LOST))


def test_a_connection_that_breaks_is_a_failure() -> None:
    with StandIn() as server:
        address = server.address

    async def one() -> dict[str, int]:
        async with Clients(Target(address, "m", 8, {}, 5.0), [Question("hi", 8, "x")], random.Random(0)) as clients:
            await clients.send(False)
            return clients.tally.counts

    assert asyncio.run(one()) == {FAILED: 1}


def test_each_outcome_keeps_its_reasons_and_the_worst_are_cited() -> None:
    """However many wrong answers came before the one that was lost."""
    tally = Tally()
    for _ in range(100):
        tally.add(WRONG, "x" * 9999)
        tally.add(OK)
    tally.add(LOST, "no end")
    tally.add(FAILED, "broken")
    assert tally.why[:2] == ["failed: broken", "lost: no end"] and len(tally.why) == 22 and max(map(len, tally.why)) == 300
    found = judge(soaked(), Report(1, "plain", outcomes=tally.counts, why=tally.why), 2.0, "")
    assert found["every request ends in an answer or a clear refusal"] == "1 failed, 1 lost, such as failed: broken"


@pytest.mark.parametrize("secure", [False, True])
def test_a_silent_client_keeps_its_key_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool) -> None:
    """Encrypted to an https address, and below the path of the address."""
    key, certificate = self_signed(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    heads: list[str] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.close()

    async def one() -> Tally:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=context if secure else None)
        where = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        target = Target(f"http{'s' if secure else ''}://{where}/below/", "m", 8, {"Authorization": "Bearer k"}, 60.0)
        async with Clients(target, [], random.Random(0)) as clients:
            clients.send = lambda stream: asyncio.create_task(asyncio.sleep(0))  # type: ignore[assignment,method-assign,misc]
            await clients.silent(2, 0.0)
            while len(heads) < 2 and not clients.tally.counts:
                await asyncio.sleep(0.01)
        server.close()
        assert all(f"Host: {where}\r\n" in head and "Authorization: Bearer k\r\n" in head for head in heads)
        return clients.tally

    assert not asyncio.run(one()).counts
    assert sorted(head.split("\r\n")[0] for head in heads) == [
        "GET /below/health HTTP/1.1", "POST /below/v1/chat/completions HTTP/1.1"]


@pytest.mark.parametrize(("address", "port", "secure"), [("http://h", 80, None), ("https://h", 443, True)])
def test_a_silent_client_that_is_refused_counts(monkeypatch: pytest.MonkeyPatch, address: str, port: int,
                                                secure: bool | None) -> None:
    asked: list[tuple[object, ...]] = []

    async def refuse(host: str, port: int, ssl: object) -> None:
        asked.append((host, port, ssl))
        raise ConnectionRefusedError("no room")

    async def one() -> Tally:
        async with Clients(Target(address, "m", 8, {}, 5.0), [], random.Random(0)) as clients:
            clients.send = lambda stream: asyncio.create_task(asyncio.sleep(0))  # type: ignore[assignment,method-assign,misc]
            await clients.silent(3, 0.0)
            return clients.tally

    monkeypatch.setattr(asyncio, "open_connection", refuse)
    tally = asyncio.run(one())
    assert tally.counts == {FAILED: 3} and "a silent connection: ConnectionRefusedError: no room" in tally.why[0]
    assert asked == [("h", port, secure)] * 3


READY = {"replicas": 2, "in_flight": 0, "running": 0, "accepted": 0}


@pytest.mark.parametrize(("told", "word"), [
    (READY, ""), (READY | {"in_flight": 3}, "'in_flight': 3"), (READY | {"running": 1}, "'running': 1"),
    (READY | {"accepted": 1}, "'accepted': 1"), (READY | {"replicas": 1}, "'replicas': 1"), ([1], "no answer"),
    (READY | {"accepted": "x" * 9999}, "xxx")])
def test_what_is_left_behind_is_told(monkeypatch: pytest.MonkeyPatch, told: object, word: str) -> None:
    """Anything that is counted at the front, in an engine or at a replica when all clients have gone."""
    with endpoint(*[(200, told)] * 99) as (address, _):
        own = Soaked(Target(address, "m", 8, {}, 20.0), "plain", 2, 6, 2, True, cast(Chaos, SimpleNamespace()))

        async def one() -> str:
            async with Clients(own.target, [], random.Random(0)) as clients:
                return await soak._left_behind(own, clients)

        monkeypatch.setattr(soak, "READY_SECONDS", 1.0 if word else 20.0)
        found = asyncio.run(one())
    if word:
        assert len(found) < 400 and "not 2 replicas with nothing in flight" in found
        assert word in found
    else:
        assert not found


@pytest.mark.parametrize("error", [InputError("x"), StoppedError("x"), RuntimeError("Serve cannot"), KeyError("a fault")])
def test_a_swap_that_serve_refuses_is_counted(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    chaos = object.__new__(Chaos)
    chaos.draws, chaos.serves, chaos.events, chaos.choices = random.Random(0), 0, {}, [AppArgs({}, "", None, "plain")] * 3

    def refuse(args: AppArgs) -> None:
        raise error

    monkeypatch.setattr(soak_chaos, "update_app", refuse)
    if isinstance(error, KeyError):
        with pytest.raises(KeyError, match="a fault"):
            chaos.swap()
    else:
        chaos.swap()
    assert chaos.events == ({} if isinstance(error, KeyError) else {"swaps_refused": 1})


def test_memory_by_hand() -> None:
    """4 MiB a minute after a first quarter that is not judged; a process of two minutes is not judged at all."""
    memory = Memory({("DecodeServer", 7): [(10.0 * n, (100 if n < 15 else 400 + (n - 15) * 4 / 6) * 2**20) for n in range(60)],
                     ("Ingress", 8): [(10.0 * n, n * 2**20) for n in range(12)]})  # type: ignore[dict-item]
    replica, front = memory.rows()
    assert replica["mib_per_minute"] == pytest.approx(4.0, abs=0.01) and front["mib_per_minute"] is None
    assert (replica["pid"], replica["first_mib"], replica["minutes"]) == (7.0, 400.0, 7.33)
    assert replica["mib"] == [100.0, 100.0, 100.0, 402.0, 406.0, 410.0, 414.0, 418.0, 422.0, 426.0]
    assert front["mib"] == [0.0, 6.0]


def soaked(address: str = "http://h", exact: bool = True) -> Soaked:
    return Soaked(Target(address, "hydra-heads", 8, {}, 20.0), "plain", 2, 6, 1, exact, None)


@pytest.mark.parametrize(("given", "patience", "limit"), [(None, 300.0, 150.0), (60.0, 300.0, 60.0), (400.0, 300.0, 150.0)])
def test_a_long_queue_is_refused_before_it_counts_as_lost(tiny_base_dir: Path, storage: Path, given: float | None,
                                                          patience: float, limit: float) -> None:
    """An application with a deep queue on a slow machine ends each request by itself, well within the clients' patience."""
    config = soak_args(load_config(None, {
        "storage": str(storage), "base.model": str(tiny_base_dir), "serve.model": "plain", "load.patience": patience,
        **({"serve.request_seconds": given} if given else {})}))
    args = resolve_args(config)
    assert (args.request_seconds, config.serve.replicas) == (limit, 2)


def test_checks() -> None:
    good = Report(1, "plain", outcomes={OK: 90, REFUSED: 40, TOLD: 2, LEFT: 5},
                  memory=[{"role": "Ingress", "pid": 1.0, "minutes": 9.0, "first_mib": 9.0, "last_mib": 9.9,
                           "mib_per_minute": 0.1}])
    assert not any(judge(soaked(), good, 2.0, "").values())
    bad = Report(1, "plain", outcomes={OK: 3, WRONG: 1, LOST: 2, REFUSED: 40}, why=["lost: no end"],
                 memory=[good.memory[0] | {"mib_per_minute": 2.5}])
    found = judge(soaked(), bad, 2.0, "3 in flight")
    assert [why for why in found.values() if why] == [
        "2 lost, such as lost: no end", "1 differ", "3 answers", "Ingress 1 grows by 2.5 MiB a minute", "3 in flight"]
    assert not judge(soaked(exact=False), bad, 2.0, "")["answers are those of plain decoding"]
    many = Report(1, "plain", memory=[good.memory[0] | {"pid": float(pid), "mib_per_minute": 9.0} for pid in range(50)])
    told = judge(soaked(), many, 2.0, "")["memory is flat"]
    assert told.endswith("Ingress 2 grows by 9.0 MiB a minute; 47 more")
    bad.checks = found
    assert "| memory is flat" in markdown(bad) and bad.failed.keys() == {name for name, why in found.items() if why}


def test_what_could_not_be_judged_is_not_said_to_hold() -> None:
    short = Report(1, "plain", outcomes={OK: 9}, memory=[{"role": "Ingress", "pid": 1.0, "minutes": 2.0, "first_mib": 9.0,
                                                          "last_mib": 99.0, "mib_per_minute": None}])
    own = replace(soaked(), chaos=cast(Chaos, SimpleNamespace()))
    assert set(unjudged(own, short)) == {"memory is flat"}
    assert set(unjudged(soaked(exact=False), short)) == {
        "memory is flat", "answers are those of plain decoding", "replicas were killed and heads swapped"}
    short.checks, short.unjudged = judge(own, short, 2.0, ""), unjudged(own, short)
    assert "| memory not judged: no process was watched for 4 minutes" in markdown(short)
    judged = Report(1, "plain", memory=[short.memory[0] | {"mib_per_minute": 0.1}])
    assert not unjudged(own, judged)


def test_a_soak_of_an_endpoint_by_its_clients(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a small server: all well, and then one that gives other answers from some request on."""
    monkeypatch.setattr(soak.Tracker, "open", lambda _: SimpleNamespace(start=lambda *_, **__: untracked()))
    config = load_config(None, {"storage": str(storage), "load.soak_minutes": 0.03, "load.max_new_tokens": 8})
    with StandIn(ours=False) as server:
        target = soaked(server.address)

        def stream(number: int, body: dict[str, Any]) -> tuple[int, str, bytes] | None:
            return events(piece(f"{server.model.base}: {body['messages'][0]['content']}"), "[DONE]") if body["stream"] else None

        server.instead = stream
        result = run_soak(config, target, ["a", "b"], seed=5)
        assert result.figures[OK] > 0 and not {FAILED, LOST, WRONG} & result.figures.keys()
        kept = json.loads((soak.soak_folder(config) / "report.json").read_text())
        assert kept["seed"] == 5 and kept["outcomes"][OK] == result.figures[OK] and not any(kept["checks"].values())
        other = 200, "application/json", json.dumps({"choices": [{"message": {"content": "other"}}]}).encode()
        server.instead = lambda number, body: (
            stream(number, body) if body["stream"] or "speculative" in body else other)  # plain decoding's own are asked first
        with pytest.raises(StoppedError, match=r"answers are those of plain decoding: \d+ differ .load\.soak_seed=5"):
            run_soak(config, target, ["a", "b"], seed=5)


@pytest.mark.slow
@pytest.mark.drawn
def test_nothing_is_lost_while_replicas_die_and_heads_change(storage: Path, tiny_base_dir: Path, tmp_path: Path, local_ray: None,
                                                             monkeypatch: pytest.MonkeyPatch,
                                                             capfd: pytest.CaptureFixture[str]) -> None:
    """Half a minute of the real command; twenty are run by hand."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(5)), encoding="utf-8")
    code = run("load", [
        "--soak", f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32", "serve.model=plain", "load.soak_seed=3",
        f"serve.port={free_port()}", "serve.max_batch_size=2", "serve.max_queued=3", f"load.prompts={prompts}",
        "load.soak_minutes=0.6", "load.max_new_tokens=24", "serve.workers.cpus=0.25", "serve.workers.threads=1"])
    said = capfd.readouterr()
    assert code == 0, said.err[-2000:]
    report = json.loads((storage / "runs" / "default" / "soak" / "report.json").read_text())
    assert report["events"]["kills"] and report["events"]["swaps"] and report["outcomes"][OK] > 20 and LEFT in report["outcomes"]
    assert {row["role"] for row in report["memory"]} == {"DecodeServer", "Ingress"} and not any(report["checks"].values())
