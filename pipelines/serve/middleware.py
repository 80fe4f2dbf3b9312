"""What every request passes before it is read: its key, its size, its patience. And what becomes of it is counted."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pipelines.serve.api_keys import opens
from pipelines.serve.openai.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/", "/health", "/ready")
"""Answered without a key: what a probe or a browser asks first. None of it decodes."""
KNOWN = "hydra_heads.known"
"""In a request's scope: whether whoever asks may be told more than a probe needs."""
ROUTES = (*OPEN, "/v1/models", "/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class Limits:
    """`key_digests`: none, and everybody may ask; `body_seconds`: in which a request's body must have come; `count`: told
    each request's route, status and seconds."""

    max_body_bytes: int
    key_digests: tuple[str, ...] = ()
    body_seconds: float = 30.0
    count: Callable[[str, int, float], None] = lambda route, status, seconds: None


class RequestMiddleware:
    """ASGI middleware. Serve makes the application before the front knows its arguments: until `limits` is set, which the
    front does as it is made, nobody is let in."""

    limits: ClassVar[Limits | None] = None

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, seen = time.perf_counter(), [499]  # the client left, unless something is sent

        async def counting(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                seen[0] = message["status"]
            await send(message)

        try:
            limits = self._limits(scope)
            body = await _body(scope, receive, limits)
            await self.app(scope, _replayed(body, receive), counting)
        except ApiError as error:
            await _send(error, counting)
        except _Gone:
            return
        except Exception:
            seen[0] = 500  # which whoever stands before us sends
            raise
        finally:
            if RequestMiddleware.limits is not None:
                route = scope["path"] if scope["path"] in ROUTES else "other"
                RequestMiddleware.limits.count(route, seen[0], time.perf_counter() - began)

    def _limits(self, scope: Scope) -> Limits:
        limits = RequestMiddleware.limits
        if limits is None:
            raise ApiError(503, "the server is starting: try again later", headers={"Retry-After": "1"})
        given = _header(scope, b"authorization")
        scope[KNOWN] = not limits.key_digests or opens(given, limits.key_digests)
        if not scope[KNOWN] and scope["path"] not in OPEN:
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY" if given is None else
                           "the API key is not one of this server's", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})
        return limits


class _Gone(Exception):
    """The client left before its request was whole."""


async def _body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The whole body. Raises ApiError 413 for one that is too long, told or found so, and 408 for one that does not come."""
    too_long = ApiError(413, f"the request is longer than the {limits.max_body_bytes} bytes allowed", code="request_too_large")
    told = _header(scope, b"content-length") or "0"
    if told.isdigit() and (len(told) > 18 or int(told) > limits.max_body_bytes):
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.max_body_bytes:
                    raise too_long
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, f"the request did not come within {limits.body_seconds:g} s", code="request_timeout") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`body` first, then what comes, which is that the client leaves."""
    left: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> MutableMapping[str, Any]:
        return left.pop() if left else await receive()

    return next_message


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), None)


async def _send(error: ApiError, send: Send) -> None:
    headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status,
                "headers": [(b"content-type", b"application/json"), *headers]})
    await send({"type": "http.response.body", "body": json.dumps(error.body()).encode()})
