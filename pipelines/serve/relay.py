"""How the front asks replicas: another one where the first refuses or dies before anything of the answer is out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from pipelines.serve.messages import Answer, Generation, Piece, Refusal
from pipelines.serve.replica_states import ReplicaStates


class Relay:
    """Sends requests to the replicas behind `server`. `seconds`: the longest time to the end of an answer, None: no limit; then
    TimeoutError is raised, and the replica told to stop."""

    def __init__(self, server: DeploymentHandle, states: ReplicaStates, seconds: float | None) -> None:
        self.server, self.streaming, self.states, self.seconds = server, server.options(stream=True), states, seconds

    async def answers(self, generation: Generation) -> list[Answer] | Refusal:
        """All answers, or why there are none."""

        def send() -> tuple[Any, Awaitable[Any]]:
            call = self.server.answers.remote(generation)
            return call, call

        async with asyncio.timeout_at(self._deadline()):
            _, found = await self._first(send)
        return found

    async def stream(self, generation: Generation) -> AsyncGenerator[Piece | Answer | Refusal, None]:
        """Pieces and answers, or one refusal."""

        def send() -> tuple[Any, Awaitable[Any]]:
            call: Any = self.streaming.stream.remote(generation)
            return call, anext(call, None)

        deadline = self._deadline()
        async with asyncio.timeout_at(deadline):
            call, item = await self._first(send)
        try:
            while item is not None:
                yield item
                async with asyncio.timeout_at(deadline):  # around each wait: a generator may go on in another task
                    item = await anext(call, None)
        except (asyncio.CancelledError, GeneratorExit, TimeoutError):
            call.cancel()
            raise

    def _deadline(self) -> float | None:
        return None if self.seconds is None else asyncio.get_running_loop().time() + self.seconds

    async def _first(self, send: Callable[[], tuple[Any, Awaitable[Any]]]) -> tuple[Any, Any]:
        """A call and its first item. Each replica may refuse once. One may die or fail over it: a request that ends replicas must
        not end them all."""
        left, died = len(self.states.replicas) - 1, False
        while True:
            call, first = send()
            try:
                found = await first
            except asyncio.CancelledError:  # the client left, or the time is over
                call.cancel()
                raise
            except RayActorError:
                with contextlib.suppress(Exception):  # one that only does not answer may still decode
                    call.cancel()
                if left < 1 or died:
                    raise
                died = True
            else:
                if left < 1 or not (isinstance(found, Refusal) and found.status == 503) or (found.in_flight and died):
                    return call, found
                died = died or found.in_flight
                self.states.avoid(found.replica)
            left -= 1
