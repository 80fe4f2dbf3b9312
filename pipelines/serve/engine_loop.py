"""The loop that runs the steps of an engine in one thread, for requests that event loops await."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass

from hydra_core.decoding import Engine, RequestEngine, StepOutput
from hydra_core.decoding.engine import Drafting
from hydra_core.errors import InputError
from hydra_core.sampling import Request

log = logging.getLogger("ray.serve")

REPORT_SECONDS = 5.0
"""Between two reports of the load while the loop is idle: Prometheus drops a gauge that nobody sets for two scrapes."""
HUNG_SECONDS = 120.0
"""After so long within one step the engine counts as hung."""
RESTART_SECONDS = 60.0
"""An engine that fails within this time after it was restarted is not restarted again."""
WATCH_SECONDS = 1.0
"""At most, between two looks at whether the engine hangs."""
TRIAL_TOKENS = 4
SIDE_BY_SIDE = 8
"""Prompt tokens that take no longer than one step of decoding, at least: a slow processor computes more of them at once."""


class EngineFailed(RuntimeError):
    """There is no answer, since the engine failed or hangs. `in_flight`: it did so while it made this answer, so the request
    itself may be the reason."""

    def __init__(self, why: str, in_flight: bool) -> None:
        super().__init__(f"the engine failed: {why}")
        self.in_flight = in_flight


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
    """Another drafter for the engine. `trial`: a small engine of its own with that drafter, which must decode first."""

    drafting: Drafting
    trial: Engine
    done: Future[None]


@dataclass(frozen=True)
class Load:
    """How busy a replica is. `kv_use`: tokens of all sequences over the key and value slots."""

    running: int
    waiting: int
    kv_use: float


class EngineLoop:
    """Runs the steps of an engine in its own thread; requests arrive and are cancelled through a command queue.

    When a step raises an exception, the requests in the batch fail with EngineFailed, and the engine is reset at once; those
    that wait for a place go on waiting. When that happens again within `RESTART_SECONDS`, when the reset engine does not decode
    either or a reset takes long, or when a step takes longer than `hung_seconds`, everything fails, `failure` is set, and the
    loop has ended.

    `after_step`: called in that thread with the load, whenever it may have changed and every few seconds; `after_failure`: with
    whether the engine could be restarted; `clock`: monotonic seconds.
    """

    def __init__(self, engine: RequestEngine, after_step: Callable[[Load], None] | None = None,
                 after_failure: Callable[[bool], None] | None = None, hung_seconds: float = HUNG_SECONDS,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.engine, self.hung_seconds = engine, hung_seconds
        self.failure: Exception | None = None
        self._after_step, self._after_failure, self._clock = after_step, after_failure, clock
        self._commands: queue.SimpleQueue[tuple[Request, _OutputQueue] | str | _Swap | None] = queue.SimpleQueue()
        self._outputs: dict[str, _OutputQueue] = {}
        self._swaps: list[_Swap] = []
        self._failed_at: float | None = None
        self._busy_since: float | None = None  # when the present step began; None: the thread waits for commands
        self._ended = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="engine-watch", daemon=True).start()

    @property
    def running(self) -> int:
        return self.engine.running

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Outputs of one request until its result. Leaving early cancels it. Raises InputError for a bad request, EngineFailed
        when the engine fails."""
        outputs = _OutputQueue(asyncio.get_running_loop(), asyncio.Queue())
        self._commands.put((request, outputs))
        self._refuse_after_the_end()
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

    def swap(self, drafting: Drafting, trial: Engine) -> Future[None]:
        """Draft with `drafting` from now on, if `trial` can decode a few tokens with the same drafter: it does so between the
        steps of the engine. When it fails, the future fails and nothing changes."""
        command = _Swap(drafting, trial, Future())
        self._commands.put(command)
        self._refuse_after_the_end()
        return command.done

    def check(self) -> None:
        """Fail everything when the engine hangs: `failure` is set then."""
        since = self._busy_since
        if since is not None and (passed := self._clock() - since) > self.hung_seconds:
            self._end(RuntimeError(f"it has not finished a step for {passed:.0f} seconds (serve.hung_seconds sets how long one "
                                   "may take)"))

    def close(self) -> None:
        """Stop the thread after its current step."""
        self._commands.put(None)
        self._thread.join(timeout=30)

    def is_over(self) -> bool:
        """Whether the thread has ended; after a failure it does so at once, unless it hangs."""
        self._thread.join(timeout=5)
        return not self._thread.is_alive()

    def _watch(self) -> None:
        while not self._ended.wait(min(WATCH_SECONDS, self.hung_seconds / 4)):
            self.check()

    def _run(self) -> None:
        try:
            while self.failure is None and self._take_commands():
                self._step()
                self._try_drafter()
                if self._after_step is not None and self.failure is None:
                    self._after_step(load_of(self.engine))
        except Exception as error:  # not of a step: these are dealt with there
            self._end(error)
        finally:
            self._ended.set()

    def _end(self, error: Exception) -> None:
        """The engine is not used any more: fail everything that waits for it. Any thread may call it."""
        with self._ending:
            if self.failure is not None:
                return
            self.failure = error
        log.error("the engine failed for good", exc_info=error)
        if self._after_failure is not None:
            self._after_failure(False)
        self._ended.set()
        waiting = {request.id for request in self.engine.unstarted()}
        self._fail(error, [name for name in self._outputs if name not in waiting])
        for outputs in self._outputs.values():
            outputs.put(EngineFailed(str(error), in_flight=False))
        self._outputs.clear()
        for swap in self._swaps:
            swap.done.set_exception(EngineFailed(str(error), in_flight=False))
        self._refuse_after_the_end()

    def _fail(self, error: Exception, ids: list[str]) -> None:
        for name in ids:
            if (outputs := self._outputs.pop(name, None)) is not None:
                outputs.put(EngineFailed(str(error), in_flight=True))

    def _refuse_after_the_end(self) -> None:
        """Fail all commands in the queue once no thread takes them any more. Every caller that adds a command calls it."""
        if self.failure is None:
            return
        refusal = EngineFailed(str(self.failure), in_flight=False)
        with contextlib.suppress(queue.Empty):
            while True:
                command = self._commands.get_nowait()
                if isinstance(command, _Swap):
                    command.done.set_exception(refusal)
                elif isinstance(command, tuple):
                    command[1].put(refusal)

    def _step(self) -> None:
        try:
            outputs = self.engine.step() if self.engine.has_work else []
        except Exception as error:
            self._restart(error)
            return
        if self.failure is not None:  # hung: nobody waits any more
            return
        for output in outputs:
            waiting = self._outputs.get(output.id)
            if output.result is not None:
                self._outputs.pop(output.id, None)
            if waiting is not None:
                waiting.put(output)

    def _restart(self, error: Exception) -> None:
        """Fail the requests in the batch, and go on with an engine that knows nothing of them."""
        now, before = self._clock(), self._failed_at
        self._failed_at = now
        again = before is not None and now - before < RESTART_SECONDS
        if self.failure is not None or again or not self.engine.resets_in_place:
            self._end(error)
            return
        log.error("the engine failed and is restarted", exc_info=error)
        waiting = self.engine.unstarted()
        left = {request.id for request in waiting}
        self._fail(error, [name for name in self._outputs if name not in left])
        try:
            self.engine.reset()
            warm_up(self.engine)
        except Exception as second:
            self._end(second)
            return
        for request in waiting:
            self.engine.add(request)
        if self._after_failure is not None:
            self._after_failure(True)

    def _take_commands(self) -> bool:
        """Apply the commands in the queue; wait for one when idle. False: stop."""
        while True:
            idle = not (self.engine.has_work or self._swaps)
            self._busy_since = None if idle else self._clock()
            try:
                command = self._commands.get(block=idle, timeout=REPORT_SECONDS)
            except queue.Empty:
                return True
            if command is None:
                return False
            if isinstance(command, _Swap):
                self._swaps.append(command)
            elif isinstance(command, str):
                self.engine.cancel(command)
                self._outputs.pop(command, None)
            else:
                self._add(*command)

    def _add(self, request: Request, outputs: _OutputQueue) -> None:
        try:
            self.engine.add(request)
            self._outputs[request.id] = outputs
        except InputError as error:
            outputs.put(error)

    def _try_drafter(self) -> None:
        """One step of the trial of the first drafter that waits; after its last step the engine takes the drafter."""
        if not self._swaps:
            return
        swap = self._swaps[0]
        try:
            if swap.trial.has_work:
                swap.trial.step()
            if swap.trial.has_work or self.failure is not None:
                return
            assert isinstance(self.engine, Engine)  # no other one gives a `Drafting`
            self.engine.change(swap.drafting)
        except Exception as error:
            swap.done.set_exception(error)
        else:
            swap.done.set_result(None)
        self._swaps.remove(swap)


def warm_up(engine: RequestEngine) -> None:
    """Decode a few tokens, so that first use happens here: compilation, allocation, and any failure."""
    engine.generate([_few_tokens(engine)])


def longest_step_seconds(engine: RequestEngine, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that an honest step of a warm `engine` may take, from the time of a few short ones: a step that computes as many
    prompt tokens as one may, which takes minutes where a large base runs on a slow processor."""
    begun = clock()
    (result,) = engine.generate([_few_tokens(engine)])
    step = (clock() - begun) / max(1, result.steps)
    return engine.most_prompt_tokens / SIDE_BY_SIDE * step


def trial_of(engine: Engine, drafting: Drafting) -> Engine:
    """A small engine with the drafter of `drafting` for `EngineLoop.swap`, with a few tokens to decode, in a cache of its own:
    slots in use are not touched."""
    limit = min(2 * TRIAL_TOKENS, engine.context_limit)
    trial = Engine(engine.base, drafting.drafter, drafting.trees, max_batch_size=1, context_limit=limit,
                   shared_noise=engine.shared_noise, graphs=engine.graphs)
    trial.add(_few_tokens(trial))
    return trial


def _few_tokens(engine: RequestEngine) -> Request:
    return Request("warm-up", (engine.base.vocab_size - 1,), TRIAL_TOKENS, stop_ids=())


def load_of(engine: RequestEngine) -> Load:
    """How busy `engine` is. Call it from the thread that runs it."""
    return Load(engine.running, engine.waiting, engine.kv_use)
