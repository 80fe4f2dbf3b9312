"""Reading the bodies of requests: only some at once and only for a while, so that bodies that never come hold nobody up."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pipelines.serve.openai.errors import RETRY_SECONDS, ApiError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
PROMPT_SECONDS = 1.0
"""In which a body comes that was sent with its request. One that takes longer gives way when too many are being read."""


class Disconnected(Exception):
    """The client left before its request was complete."""


class BodyReaders:
    """The bodies that are being read by one front. `most`: at once; `seconds`: for each; `longest`: bytes of one."""

    def __init__(self, most: int, seconds: float, longest: int) -> None:
        self.most, self.seconds, self.longest = most, seconds, longest
        self._numbers = itertools.count()
        self._reading: dict[int, tuple[float, asyncio.Timeout]] = {}

    async def read(self, length: str | None, receive: Receive, most: int | None = None) -> bytes:
        """The whole body. `length`: the Content-Length header; `most`: bytes that it may have, where these are fewer than usual.

        Raises ApiError 413 for one that is too long, by its header or its size, 408 for one that does not come in time, 503 when
        too many are being read; Disconnected.
        """
        longest = self.longest if most is None else min(most, self.longest)
        if length is not None and length.isdigit() and (len(length) > 18 or int(length) > longest):
            raise _too_long(longest)
        number = next(self._numbers)
        now = asyncio.get_running_loop().time()
        self._make_room(now)
        try:
            async with asyncio.timeout_at(now + self.seconds) as limit:
                self._reading[number] = now, limit
                return await _parts(receive, longest)
        except TimeoutError:
            raise ApiError(408, f"the request did not come within {self.seconds:g} s, or others needed its place",
                           code="request_timeout") from None
        finally:
            self._reading.pop(number, None)

    def _make_room(self, now: float) -> None:
        """End the oldest reading if it is slow. Raises ApiError 503 when none is."""
        if len(self._reading) < self.most:
            return
        number, (began, limit) = next(iter(self._reading.items()))
        if now - began < PROMPT_SECONDS:
            raise ApiError(503, "too many requests arrive at this moment: try again later", code="too_many_requests",
                           headers={"Retry-After": str(RETRY_SECONDS)})
        del self._reading[number]
        if not limit.expired():  # its own time has just run out
            limit.reschedule(now)


async def _parts(receive: Receive, longest: int) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > longest:
            raise _too_long(longest)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_long(longest: int) -> ApiError:
    return ApiError(413, f"the request is longer than the {longest} bytes allowed", code="request_too_large")
