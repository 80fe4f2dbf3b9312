"""Engines on one base, driven by one thread, awaited from event loops."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass

from hydra_core.decoding import Engine, StepOutput
from hydra_core.errors import InputError
from hydra_core.sampling import Request

TELL_SECONDS = 5.0
"""After which an idle host tells its load again: a gauge that nobody sets is gone from the next scrape but one."""


@dataclass(frozen=True)
class _Sink:
    """Where a request's outputs go: a queue that belongs to an event loop."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[StepOutput | Exception]

    def put(self, item: StepOutput | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone with the process that asked
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


@dataclass(frozen=True)
class _Swap:
    engine: Engine
    done: Future[None]


@dataclass(frozen=True)
class Load:
    """How busy a replica is. `kv_use`: share of the newest engine's key and value slots that rows of all engines hold."""

    running: int
    waiting: int
    kv_use: float


class EngineLoop:
    """Runs engines' steps in a thread of its own; requests come and go through a command queue.

    New requests go to the newest engine; older ones stay until what they began is done. After an exception in a step
    every request in flight fails with it and `failure` is set: the host is then dead. `after_step`: told the load
    whenever it may have changed and every few seconds besides, in that thread.
    """

    def __init__(self, engine: Engine, after_step: Callable[[Load], None] | None = None) -> None:
        self.engine = engine
        self.failure: Exception | None = None
        self._older: list[Engine] = []
        self._after_step = after_step
        self._commands: queue.SimpleQueue[tuple[Request, _Sink] | str | _Swap | None] = queue.SimpleQueue()
        self._sinks: dict[str, _Sink] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return sum(engine.running for engine in self._engines())

    async def stream(self, request: Request) -> AsyncIterator[StepOutput]:
        """Outputs of one request until its result. Leaving early cancels it. Raises InputError for a bad request."""
        sink = _Sink(asyncio.get_running_loop(), asyncio.Queue())
        self._commands.put((request, sink))
        if self.failure is not None:
            self._refuse_commands(self.failure)
        done = False
        try:
            while not done:
                item = await sink.queue.get()
                if isinstance(item, Exception):
                    done = True
                    raise item
                done = item.result is not None
                yield item
        finally:
            if not done:
                self._commands.put(request.id)

    def swap(self, engine: Engine) -> Future[None]:
        """Decode new requests with `engine`, once a warm-up on it has run. The future fails, and nothing is changed,
        where the warm-up does."""
        command = _Swap(engine, Future())
        self._commands.put(command)
        if self.failure is not None:
            self._refuse_commands(self.failure)
        return command.done

    def close(self) -> None:
        """Stop the thread after the step it is in."""
        self._commands.put(None)
        self._thread.join(timeout=30)

    def _engines(self) -> list[Engine]:
        return [*self._older, self.engine]

    def _run(self) -> None:
        try:
            while self._take_commands():
                for engine in self._engines():
                    self._step(engine)
                self._older = [engine for engine in self._older if engine.has_work]
                if self._after_step is not None:
                    self._after_step(load_of(self._engines()))
        except Exception as error:
            self.failure = error
            for sink in self._sinks.values():
                sink.put(RuntimeError(f"the engine failed: {error}"))
            self._sinks.clear()
            self._refuse_commands(error)

    def _refuse_commands(self, failure: Exception) -> None:
        """Nobody takes commands any more: whoever waits for an answer to one is told so. By the thread that died, and by
        everyone who asks after that."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if isinstance(command, _Swap):
                    command.done.set_exception(RuntimeError(f"the engine failed: {failure}"))
                elif isinstance(command, tuple):
                    command[1].put(RuntimeError(f"the engine failed: {failure}"))

    def _step(self, engine: Engine) -> None:
        for output in engine.step() if engine.has_work else ():
            sink = self._sinks.get(output.id)
            if output.result is not None:
                self._sinks.pop(output.id, None)
            if sink is not None:
                sink.put(output)

    def _take_commands(self) -> bool:
        """Apply what has been asked; wait for something to do when idle. False: stop."""
        while True:
            try:
                idle = not any(engine.has_work for engine in self._engines())
                command = self._commands.get(block=idle, timeout=TELL_SECONDS)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, _Swap):
                self._take_over(command)
            elif isinstance(command, str):
                for engine in self._engines():
                    engine.cancel(command)
                self._sinks.pop(command, None)
            else:
                self._add(*command)

    def _add(self, request: Request, sink: _Sink) -> None:
        try:
            self.engine.add(request)
            self._sinks[request.id] = sink
        except InputError as error:
            sink.put(error)

    def _take_over(self, command: _Swap) -> None:
        try:
            warm_up(command.engine)
        except Exception as error:
            command.done.set_exception(error)
            return
        if self.engine.has_work:  # else it goes at once, and its memory with it
            self._older.append(self.engine)
        self.engine = command.engine
        command.done.set_result(None)


def warm_up(engine: Engine) -> None:
    """Decode a few tokens: what is made at first use is made, and what cannot work fails here."""
    engine.generate([Request("warm-up", (engine.base.vocab_size - 1,), 4, stop_ids=())])


def load_of(engines: list[Engine]) -> Load:
    """How busy `engines` are together, the newest last. For the thread that drives them."""
    rows = [row for engine in engines for row in
            [*engine.scheduler.decoding, *(engine.scheduler.prefill.sequences if engine.scheduler.prefill else ())]]
    held = sum(len(row.request.prompt_ids) + len(row.tokens) for row in rows)
    newest = engines[-1]
    return Load(sum(engine.running for engine in engines), sum(engine.waiting for engine in engines),
                held / (newest.max_batch_size * newest.context_limit))
