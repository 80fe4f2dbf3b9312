"""An engine that fails is restarted at once, one that goes on failing or hangs is given up, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine, Result, naive_generate
from hydra_core.errors import InputError
from hydra_core.proposers import NgramDrafter
from hydra_core.sampling import Request
from pipelines.config import load_config
from pipelines.serve import engine_loop as module
from pipelines.serve.engine_loop import RESTART_SECONDS, EngineFailed, EngineLoop, trial_of
from pipelines.serve.messages import AppArgs, Generation, Refusal
from pipelines.serve.replica import DecodeServer
from pipelines.serve.user_config import heads_of


class Now:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Now:
    return Now()


@pytest.fixture
def told() -> list[bool]:
    """For each failure, whether the engine was restarted."""
    return []


@pytest.fixture
def loop(tiny_base: Base, clock: Now, told: list[bool]) -> Iterator[EngineLoop]:
    made = EngineLoop(Engine(tiny_base, max_batch_size=2, draft_slots=16), after_failure=told.append, clock=clock)
    yield made
    made.close()
    assert made.is_over()


def request(name: str, tokens: int = 20) -> Request:
    return Request(name, (5, 6, 7), tokens, temperature=1.0, seed=len(name), stop_ids=())


async def answer(loop: EngineLoop, asked: Request) -> Result:
    result = None
    async for output in loop.stream(asked):
        result = output.result
    assert result is not None
    return result


def fail_steps(loop: EngineLoop, monkeypatch: pytest.MonkeyPatch, poisoned: Callable[[Engine], bool]) -> None:
    """Steps of the engine raise while `poisoned` says so, after the step has begun."""
    step = loop.engine._step

    def broken() -> object:
        outputs = step()
        if poisoned(loop.engine):
            raise RuntimeError("out of memory")
        return outputs

    monkeypatch.setattr(loop.engine, "_step", broken)


def test_a_failed_engine_is_restarted_and_those_that_waited_are_answered(
        loop: EngineLoop, tiny_base: Base, told: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows decode when a step fails; three requests wait for a row, and nothing was done for them yet."""
    keys = loop.engine.cache.keys.data_ptr()
    failures = []

    def once(engine: Engine) -> bool:
        if not failures and engine.running == 2 and engine.waiting == 3:
            failures.append(1)
            return True
        return False

    fail_steps(loop, monkeypatch, once)
    asked = [request("x" * count) for count in range(1, 6)]

    async def ask() -> list[Result | BaseException]:
        return await asyncio.gather(*(answer(loop, one) for one in asked), return_exceptions=True)

    found = asyncio.run(ask())
    assert failures and told == [True] and loop.failure is None
    for lost in found[:2]:
        assert isinstance(lost, EngineFailed) and lost.in_flight and str(lost) == "the engine failed: out of memory"
    for kept, one in zip(found[2:], asked[2:], strict=True):
        assert isinstance(kept, Result) and kept.token_ids == naive_generate(tiny_base, one).token_ids
    assert loop.engine.cache.keys.data_ptr() == keys
    again = asyncio.run(answer(loop, asked[0]))
    assert again.token_ids == naive_generate(tiny_base, asked[0]).token_ids


def test_a_request_that_always_fails_does_not_restart_it_for_ever(loop: EngineLoop, clock: Now, told: list[bool],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    fail_steps(loop, monkeypatch, lambda engine: "poison" in engine.scheduler.ids)

    async def fails(name: str) -> EngineFailed:
        with pytest.raises(EngineFailed) as failed:
            await answer(loop, request(name))
        return failed.value

    assert asyncio.run(fails("poison")).in_flight
    clock.seconds += RESTART_SECONDS + 1
    assert asyncio.run(fails("poison")).in_flight  # long after the first: once more
    assert asyncio.run(answer(loop, request("good"))).token_ids and loop.failure is None
    clock.seconds += RESTART_SECONDS - 1
    assert asyncio.run(fails("poison")).in_flight
    assert told == [True, True, False] and str(loop.failure) == "out of memory"
    assert not asyncio.run(fails("good")).in_flight  # nothing was done for it: another replica may answer it


def test_an_engine_that_cannot_be_reset_is_given_up(loop: EngineLoop, told: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.engine, "reset", lambda: (_ for _ in ()).throw(RuntimeError("no device")))
    fail_steps(loop, monkeypatch, lambda engine: True)

    async def ask() -> None:
        with pytest.raises(EngineFailed, match="the engine failed: out of memory"):
            await answer(loop, request("a"))
        assert loop.is_over()
        with pytest.raises(EngineFailed, match="the engine failed: no device"):
            await answer(loop, request("b"))
        drafting = loop.engine.prepare()
        with pytest.raises(EngineFailed, match="no device"):
            await asyncio.wrap_future(loop.swap(drafting, trial_of(loop.engine, drafting)))

    asyncio.run(ask())
    assert told == [False]


def test_a_hung_engine_fails_its_requests_and_the_replica(tiny_base_dir: Path, tmp_path: Path, clock: Now,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_config(None, {"base.model": str(tiny_base_dir), "base.dtype": "fp32", "storage": "/s"}).base
    args = AppArgs(base.model_dump(), str(tmp_path), None, "plain", threads=1, max_batch_size=1, hung_seconds=30.0)
    go_on, reached = threading.Event(), threading.Event()
    real = module.EngineLoop

    def on_our_clock(engine: Engine, *rest: object) -> EngineLoop:
        return real(engine, *rest, clock=clock)  # type: ignore[arg-type]

    monkeypatch.setattr("pipelines.serve.replica.EngineLoop", on_our_clock)

    async def ask() -> None:
        server = DecodeServer(args)
        await server.reconfigure(heads_of(args))
        loop = server.engine_loop
        assert loop is not None and loop.hung_seconds == 30.0
        step = loop.engine.step

        def stuck() -> object:
            reached.set()
            assert go_on.wait(60)
            return step()

        monkeypatch.setattr(loop.engine, "step", stuck)
        pending = [asyncio.ensure_future(server.generate(Generation(name, 9, prompt_ids=[5, 6]))) for name in ("a", "b")]
        await asyncio.to_thread(reached.wait, 60)
        clock.seconds += 29
        server.check_health()
        assert not (await server.info())["failed"] and not any(one.done() for one in pending)
        clock.seconds += 2
        with pytest.raises(RuntimeError, match="the engine has failed"):
            server.check_health()
        for refusal in await asyncio.gather(*pending):
            assert isinstance(refusal, Refusal) and refusal.status == 503
            assert "has not finished a step for 31 seconds (serve.hung_seconds" in refusal.message
        assert (await server.info())["failed"]
        refusal = await server.generate(Generation("c", 9, prompt_ids=[5, 6]))
        assert isinstance(refusal, Refusal) and refusal.status == 503
        go_on.set()
        assert loop.is_over()

    asyncio.run(ask())


@pytest.mark.parametrize(("tree", "tokens"), [(True, 4096), (False, 9000)])
def test_a_slow_step_is_honest_where_the_prompt_is_long(tree: bool, tokens: int) -> None:
    """Ten seconds for each step of decoding: a CPU with a large base."""
    clock = Now()

    def generate(requests: list[Request]) -> list[SimpleNamespace]:
        clock.seconds += 10.0 * 3
        return [SimpleNamespace(steps=3) for _ in requests]

    engine = SimpleNamespace(generate=generate, context_limit=9000, base=SimpleNamespace(supports_tree=tree, vocab_size=9))
    engine.most_prompt_tokens = Engine.most_prompt_tokens.fget(engine)  # type: ignore[attr-defined]
    assert module.longest_step_seconds(engine, clock) == pytest.approx(tokens / 8 * 10)  # type: ignore[arg-type]


def test_the_limit_of_a_step_is_never_below_an_honest_one(tiny_base_dir: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_config(None, {"base.model": str(tiny_base_dir), "base.dtype": "fp32", "storage": "/s"}).base
    args = AppArgs(base.model_dump(), str(tmp_path), None, "plain", threads=1, max_batch_size=1, hung_seconds=30.0)
    monkeypatch.setattr("pipelines.serve.replica.longest_step_seconds", lambda engine: 700.0)
    server = DecodeServer(args)
    asyncio.run(server.reconfigure(heads_of(args)))
    assert server.engine_loop is not None and server.engine_loop.hung_seconds == 700.0
    server.engine_loop.close()


def test_an_idle_engine_does_not_hang(loop: EngineLoop, clock: Now) -> None:
    async def long_pause() -> None:
        async with asyncio.timeout(60):
            while loop._busy_since is not None:  # the step that made the last token ends
                await asyncio.sleep(0)
        clock.seconds += 10 * loop.hung_seconds
        loop.check()

    async def ask() -> None:
        for name in "ab":
            await answer(loop, request(name))
            await long_pause()

    asyncio.run(ask())
    assert loop.failure is None


def test_a_drafter_whose_trial_fails_changes_nothing(loop: EngineLoop, tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails beside a sequence that decodes, which notices nothing of it."""
    drafting = loop.engine.prepare(NgramDrafter(min_match=1))
    bad, good = trial_of(loop.engine, drafting), trial_of(loop.engine, drafting)
    monkeypatch.setattr(bad.proposer, "commit", lambda *rest: (_ for _ in ()).throw(ValueError("no such kernel")))

    async def ask() -> tuple[list[int], Result]:
        tokens, swapped = [], False
        async for output in loop.stream(request("a", 60)):
            tokens += output.token_ids
            if not swapped:
                swapped = True
                with pytest.raises(ValueError, match="no such kernel"):
                    await asyncio.wrap_future(loop.swap(drafting, bad))
                assert loop.engine.drafting.drafter is None
                await asyncio.wrap_future(loop.swap(drafting, good))
                assert loop.engine.drafting is drafting and loop.engine.has_work
        return tokens, await answer(loop, request("later", 60))

    tokens, later = asyncio.run(ask())
    assert tuple(tokens) == naive_generate(tiny_base, request("a", 60)).token_ids
    assert later.token_ids == naive_generate(tiny_base, request("later", 60)).token_ids and later.drafted > 0


def test_a_bad_request_fails_alone(loop: EngineLoop) -> None:
    async def ask() -> None:
        with pytest.raises(InputError, match="prompt: is empty"):
            await answer(loop, Request("a", (), 3))
        assert (await answer(loop, request("b", 3))).token_ids

    asyncio.run(ask())
