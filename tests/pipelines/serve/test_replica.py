"""A replica without Serve: what a request may take, and what is told of it."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections import Counter
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
    ends: list[tuple[str, int]] = []
    monkeypatch.setattr(server.metrics, "unfinished", lambda reason, tokens: ends.append((reason, tokens)))

    async def ask() -> list[object]:
        items = [item async for item in server.stream(replace(GENERATION, n=2, max_new_tokens=200, seconds=5.0))]
        go_on.set()
        assert isinstance(await server.generate(replace(GENERATION, id="h", max_new_tokens=3, seconds=60.0)), Answer)
        return items

    items = asyncio.run(ask())
    assert [type(item) for item in items[:-1]] == [Piece] * (len(items) - 1) and len(items) > 1
    assert isinstance(items[-1], Refusal) and items[-1].status == 504 and "within the 5 seconds" in items[-1].message
    made = [sum(len(item.depths) for item in items if isinstance(item, Piece) and item.index == index) for index in range(2)]
    assert server.in_flight == 0 and engine.running == 0 and ends == [("timeout", count) for count in made] and min(made) > 0


def test_how_answers_ended_is_counted(server: DecodeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of answers that were not finished too."""
    assert server.engine_loop is not None
    engine, step, ends, tokens = server.engine_loop.engine, server.engine_loop.engine.step, Counter[str](), Counter[str]()
    monkeypatch.setattr(server.metrics.finished, "inc", lambda tags: ends.update(tags.values()))
    monkeypatch.setattr(server.metrics.counters["hydra_completion_tokens"], "inc", lambda value: tokens.update({"made": value}))

    def broken() -> list[object]:
        raise RuntimeError("out of memory")

    async def ask() -> None:
        answer = await server.generate(replace(GENERATION, max_new_tokens=5))
        assert isinstance(answer, Answer) and tokens == {"made": len(answer.token_ids)}
        tokens.clear()
        leaving = server.stream(replace(GENERATION, max_new_tokens=200))
        pieces = [await anext(leaving) for _ in range(3)]
        await leaving.aclose()  # type: ignore[attr-defined]
        # those that waited to be sent count too
        assert tokens["made"] >= sum(len(piece.depths) for piece in pieces if isinstance(piece, Piece)) >= 3
        assert isinstance(await server.generate(replace(GENERATION, id="bad", prompt_ids=[-1])), Refusal)
        while engine.has_work:  # the row of the client that left, which would fail in place of the next
            await asyncio.sleep(0.001)
        monkeypatch.setattr(engine, "step", broken)
        assert isinstance(await server.generate(replace(GENERATION, id="lost")), Refusal)
        monkeypatch.setattr(engine, "step", step)

    asyncio.run(ask())
    assert ends == {"length": 1, "cancelled": 1, "failed": 1}


def test_a_replica_goes_on_after_one_failure(server: DecodeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller learns that its own request may be the reason; the next one is answered by the same replica."""
    assert server.engine_loop is not None
    step, failures, told = server.engine_loop.engine._step, [1], Counter[str]()
    for name in ("hydra_engine_failures", "hydra_engine_restarts"):
        monkeypatch.setattr(server.metrics.counters[name], "inc", functools.partial(told.update, [name]))

    def once() -> object:
        outputs = step()
        if failures:
            failures.pop()
            raise RuntimeError("out of memory")
        return outputs

    monkeypatch.setattr(server.engine_loop.engine, "_step", once)

    async def ask() -> None:
        refusal = await server.generate(GENERATION)
        assert refusal == Refusal(503, "the engine failed: out of memory: try again later", in_flight=True)
        assert isinstance(await server.generate(GENERATION), Answer)
        server.check_health()
        assert not (await server.info())["failed"] and server.in_flight == 0

    asyncio.run(ask())
    assert told == {"hydra_engine_failures": 1, "hydra_engine_restarts": 1}


def test_time_before_the_replica_counts(server: DecodeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[float] = []
    monkeypatch.setattr(server.metrics, "first_token", first.append)
    late = replace(GENERATION, arrived=time.time() - 100)
    found = asyncio.run(server.generate(replace(late, seconds=99.0)))
    assert isinstance(found, Refusal) and found.status == 504 and not first and server.in_flight == 0
    assert isinstance(asyncio.run(server.generate(replace(late, seconds=400.0))), Answer)
    assert isinstance(asyncio.run(server.generate(replace(GENERATION, arrived=time.time() + 50, seconds=40.0))), Answer)
    assert first[0] >= 100 and 0 <= first[1] < 40  # a front whose clock is ahead waits no negative time



def test_a_later_turn_says_how_much_of_it_was_known(args: AppArgs) -> None:
    """With `prefix_cache_tokens`; without, nothing is kept."""
    async def ask(server: DecodeServer) -> list[Answer]:
        await server.reconfigure(heads_of(args))
        first = await server.generate(replace(GENERATION, temperature=0.0, prompt_ids=list(range(5, 45)), max_new_tokens=30))
        assert isinstance(first, Answer)
        said = [*range(5, 45), *first.token_ids, 7]
        second = await server.generate(replace(GENERATION, id="h", temperature=0.0, prompt_ids=said, max_new_tokens=5))
        assert isinstance(second, Answer)
        return [first, second]

    for tokens, known in ((200, 64), (0, 0)):  # 40 + 30 tokens less the last one, in blocks of 8
        server = DecodeServer(replace(args, prefix_cache_tokens=tokens))
        first, second = asyncio.run(ask(server))
        assert server.engine_loop is not None
        server.engine_loop.close()
        assert (first.cached_tokens, second.cached_tokens) == (0, known if len(first.token_ids) == 30 else second.cached_tokens)
        assert (second.cached_tokens > 0) == (tokens > 0)
