"""The loop that runs the steps of engines in one thread, for requests that event loops await."""

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

REPORT_SECONDS = 5.0
"""Between two reports of the load while the loop is idle: Prometheus drops a gauge that nobody sets for two scrapes."""


@dataclass(frozen=True)
class _OutputQueue:
    """The queue of a request's outputs; it belongs to an event loop."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[StepOutput | Exception]

    def put(self, item: StepOutput | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the caller's loop has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


@dataclass(frozen=True)
class _Swap:
    engine: Engine
    done: Future[None]


@dataclass(frozen=True)
class Load:
    """How busy a replica is. `kv_use`: tokens of all engines' sequences over the newest engine's key and value slots."""

    running: int
    waiting: int
    kv_use: float


class EngineLoop:
    """Runs the steps of engines in its own thread; requests arrive and are cancelled through a command queue.

    New requests go to the newest engine; an older engine stays until its requests are finished. After an exception in a step
    every request in flight fails with it, `failure` is set, and the loop has ended. `after_step`: called in that thread with
    the load, whenever it may have changed and every few seconds.
    """

    def __init__(self, engine: Engine, after_step: Callable[[Load], None] | None = None) -> None:
        self.engine = engine
        self.failure: Exception | None = None
        self._older: list[Engine] = []
        self._after_step = after_step
        self._commands: queue.SimpleQueue[tuple[Request, _OutputQueue] | str | _Swap | None] = queue.SimpleQueue()
        self._outputs: dict[str, _OutputQueue] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return sum(engine.running for engine in self._engines())

    async def stream(self, request: Request) -> AsyncIterator[StepOutput]:
        """Outputs of one request until its result. Leaving early cancels it. Raises InputError for a bad request."""
        outputs = _OutputQueue(asyncio.get_running_loop(), asyncio.Queue())
        self._commands.put((request, outputs))
        if self.failure is not None:
            self._refuse_commands(self.failure)
        done = False
        try:
            while not done:
                item = await outputs.queue.get()
                if isinstance(item, Exception):
                    done = True
                    raise item
                done = item.result is not None
                yield item
        finally:
            if not done:
                self._commands.put(request.id)

    def swap(self, engine: Engine) -> Future[None]:
        """Decode new requests with `engine` after a warm-up on it. When the warm-up fails, the future fails and nothing
        changes."""
        command = _Swap(engine, Future())
        self._commands.put(command)
        if self.failure is not None:
            self._refuse_commands(self.failure)
        return command.done

    def close(self) -> None:
        """Stop the thread after its current step."""
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
            for outputs in self._outputs.values():
                outputs.put(RuntimeError(f"the engine failed: {error}"))
            self._outputs.clear()
            self._refuse_commands(error)

    def _refuse_commands(self, failure: Exception) -> None:
        """Fail all commands in the queue, since no thread takes them any more. The failed thread calls it, and later every
        caller that adds a command."""
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if isinstance(command, _Swap):
                    command.done.set_exception(RuntimeError(f"the engine failed: {failure}"))
                elif isinstance(command, tuple):
                    command[1].put(RuntimeError(f"the engine failed: {failure}"))

    def _step(self, engine: Engine) -> None:
        for output in engine.step() if engine.has_work else ():
            outputs = self._outputs.get(output.id)
            if output.result is not None:
                self._outputs.pop(output.id, None)
            if outputs is not None:
                outputs.put(output)

    def _take_commands(self) -> bool:
        """Apply the commands in the queue; wait for one when idle. False: stop."""
        while True:
            try:
                idle = not any(engine.has_work for engine in self._engines())
                command = self._commands.get(block=idle, timeout=REPORT_SECONDS)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, _Swap):
                self._take_over(command)
            elif isinstance(command, str):
                for engine in self._engines():
                    engine.cancel(command)
                self._outputs.pop(command, None)
            else:
                self._add(*command)

    def _add(self, request: Request, outputs: _OutputQueue) -> None:
        try:
            self.engine.add(request)
            self._outputs[request.id] = outputs
        except InputError as error:
            outputs.put(error)

    def _take_over(self, command: _Swap) -> None:
        try:
            warm_up(command.engine)
        except Exception as error:
            command.done.set_exception(error)
            return
        if self.engine.has_work:  # else it is freed at once
            self._older.append(self.engine)
        self.engine = command.engine
        command.done.set_result(None)


def warm_up(engine: Engine) -> None:
    """Decode a few tokens, so that first use happens here: compilation, allocation, and any failure."""
    engine.generate([Request("warm-up", (engine.base.vocab_size - 1,), 4, stop_ids=())])


def load_of(engines: list[Engine]) -> Load:
    """How busy `engines` are together, the newest last. Call it from the thread that runs them."""
    rows = [row for engine in engines for row in
            [*engine.scheduler.decoding, *(engine.scheduler.prefill.sequences if engine.scheduler.prefill else ())]]
    held = sum(len(row.request.prompt_ids) + len(row.tokens) for row in rows)
    newest = engines[-1]
    return Load(sum(engine.running for engine in engines), sum(engine.waiting for engine in engines),
                held / (newest.max_batch_size * newest.context_limit))
