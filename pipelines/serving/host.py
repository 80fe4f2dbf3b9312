"""One engine, driven by one thread, awaited from an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

from hydra_core.decoding import Engine, Request, StepOutput
from hydra_core.errors import InputError


@dataclass(frozen=True)
class _Sink:
    """Where a request's outputs go: a queue that belongs to an event loop."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[StepOutput | Exception]

    def put(self, item: StepOutput | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is gone with the process that asked
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)


class EngineHost:
    """Runs an engine's steps in a thread of its own; requests come and go through a command queue.

    After an exception in a step every request in flight fails with it and `failure` is set: the host is then dead.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failure: Exception | None = None
        self._commands: queue.SimpleQueue[tuple[Request, _Sink] | str | None] = queue.SimpleQueue()
        self._sinks: dict[str, _Sink] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return self.engine.running

    async def stream(self, request: Request) -> AsyncIterator[StepOutput]:
        """Outputs of one request until its result. Leaving early cancels it. Raises InputError for a bad request."""
        sink = _Sink(asyncio.get_running_loop(), asyncio.Queue())
        if self.failure is not None:
            raise RuntimeError("the engine has failed") from self.failure
        self._commands.put((request, sink))
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

    def close(self) -> None:
        """Stop the thread after the step it is in."""
        self._commands.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while self._take_commands():
                for output in self.engine.step():
                    sink = self._sinks.get(output.id)
                    if output.result is not None:
                        self._sinks.pop(output.id, None)
                    if sink is not None:
                        sink.put(output)
        except Exception as error:
            self.failure = error
            for sink in self._sinks.values():
                sink.put(RuntimeError(f"the engine failed: {error}"))
            self._sinks.clear()

    def _take_commands(self) -> bool:
        """Apply what has been asked; wait for something to do when idle. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, str):
                self.engine.cancel(command)
                self._sinks.pop(command, None)
                continue
            request, sink = command
            try:
                self.engine.add(request)
                self._sinks[request.id] = sink
            except InputError as error:
                sink.put(error)
