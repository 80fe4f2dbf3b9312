"""A soak: what becomes of each request is told apart, memory is judged by its slope, and a failed check is told."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hydra_core.errors import StoppedError
from jobs.runner import run
from pipelines.config import load_config
from pipelines.load import soak
from pipelines.load.client import Target
from pipelines.load.soak import Report, Soaked, judge, markdown, run_soak
from pipelines.load.soak_chaos import Memory
from pipelines.load.soak_clients import FAILED, LEFT, LOST, OK, REFUSED, TOLD, WRONG, Clients, Question
from tests.pipelines.batch.stand_in import A, StandIn
from tests.pipelines.batch.test_any_order import untracked
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


def test_memory_by_hand() -> None:
    """4 MiB a minute after a first quarter that is not judged; a process of two minutes is not judged at all."""
    memory = Memory({("DecodeServer", 7): [(10.0 * n, (100 if n < 15 else 400 + (n - 15) * 4 / 6) * 2**20) for n in range(60)],
                     ("Ingress", 8): [(10.0 * n, n * 2**20) for n in range(12)]})  # type: ignore[dict-item]
    replica, front = memory.rows()
    assert replica["mib_per_minute"] == pytest.approx(4.0, abs=0.01) and front["mib_per_minute"] is None
    assert (replica["pid"], replica["first_mib"], replica["minutes"]) == (7.0, 400.0, 7.33)


def soaked(address: str = "http://h", exact: bool = True) -> Soaked:
    return Soaked(Target(address, "hydra-heads", 8, {}, 20.0), "plain", 2, 6, 1, exact, None)


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
    bad.checks = found
    assert "| memory is flat" in markdown(bad) and bad.failed.keys() == {name for name, why in found.items() if why}


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
        assert result.figures[OK] > 20 and not {FAILED, LOST, WRONG} & result.figures.keys()
        kept = json.loads((soak.soak_folder(config) / "report.json").read_text())
        assert kept["seed"] == 5 and kept["outcomes"][OK] == result.figures[OK] and not any(kept["checks"].values())
        other = 200, "application/json", json.dumps({"choices": [{"message": {"content": "other"}}]}).encode()
        server.instead = lambda number, body: (
            other if number % 7 == 0 and not body["stream"] else stream(number, body))
        with pytest.raises(StoppedError, match=r"answers are those of plain decoding: \d+ differ .load\.soak_seed=5"):
            run_soak(config, target, ["a", "b"], seed=5)


@pytest.mark.slow
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
