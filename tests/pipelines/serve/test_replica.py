"""A replica without Serve: what a request may take, and what is told of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config import load_config
from pipelines.serve.messages import Answer, AppArgs, Generation, Piece, Refusal
from pipelines.serve.replica import DecodeServer
from pipelines.serve.user_config import heads_of

GENERATION = Generation("g", 60, temperature=1.0, seed=3, prompt_ids=[5, 6, 7])


@pytest.fixture(scope="module")
def args(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> AppArgs:
    base = load_config(None, {"base.model": str(tiny_base_dir), "base.dtype": "fp32", "storage": "/s"}).base
    return AppArgs(base.model_dump(), str(tmp_path_factory.mktemp("cache")), None, "plain", threads=1)


@pytest.fixture
def server(args: AppArgs) -> Iterator[DecodeServer]:
    """As Serve makes one; plain decoding."""
    made = DecodeServer(args)
    asyncio.run(made.reconfigure(heads_of(args)))
    yield made
    assert made.engine_loop is not None
    made.engine_loop.close()


def test_an_answer_that_takes_too_long_is_refused_and_its_rows_are_freed(server: DecodeServer,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.engine_loop is not None
    engine, go_on = server.engine_loop.engine, threading.Event()
    step, taken = engine.step, []

    def slow() -> list[object]:
        taken.append(1)
        if len(taken) > 2:
            assert go_on.wait(60)
        return step()

    monkeypatch.setattr(engine, "step", slow)

    async def ask() -> list[object]:
        items = [item async for item in server.stream(replace(GENERATION, n=2, max_new_tokens=200, seconds=0.5))]
        go_on.set()
        assert isinstance(await server.generate(replace(GENERATION, id="h", max_new_tokens=3, seconds=60.0)), Answer)
        return items

    items = asyncio.run(ask())
    assert [type(item) for item in items[:-1]] == [Piece] * (len(items) - 1) and len(items) > 1
    assert isinstance(items[-1], Refusal) and items[-1].status == 504 and "within the 0.5 seconds" in items[-1].message
    assert server.in_flight == 0 and engine.running == 0


def test_time_before_the_replica_counts(server: DecodeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[float] = []
    monkeypatch.setattr(server.metrics, "first_token", first.append)
    late = replace(GENERATION, arrived=time.time() - 100)
    found = asyncio.run(server.generate(replace(late, seconds=99.0)))
    assert isinstance(found, Refusal) and found.status == 504 and not first and server.in_flight == 0
    assert isinstance(asyncio.run(server.generate(replace(late, seconds=400.0))), Answer)
    assert isinstance(asyncio.run(server.generate(replace(GENERATION, arrived=time.time() + 50, seconds=40.0))), Answer)
    assert first[0] >= 100 and 0 <= first[1] < 40  # a front whose clock is ahead waits no negative time
