"""The ASGI middleware that every request passes first: API key, size and time of the body; it also counts responses."""

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
"""Paths that need no key: probes, and the page that a browser opens first. None of them decodes."""
KNOWN = "hydra_heads.known"
"""In a request's scope: whether the client has a valid key, and so may see more than a probe needs."""
ROUTES = (*OPEN, "/v1/models", "/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class Limits:
    """Limits of requests. `key_digests`: empty: no key is needed; `body_seconds`: in which a request's body must arrive;
    `count`: called with the route, status and seconds of each request."""

    max_body_bytes: int
    key_digests: tuple[str, ...] = ()
    body_seconds: float = 30.0
    count: Callable[[str, int, float], None] = lambda route, status, seconds: None


class RequestMiddleware:
    """Checks key and body of each request. Serve creates the application before the ingress has its arguments, so every request
    gets 503 until the ingress sets `limits`."""

    limits: ClassVar[Limits | None] = None

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, seen = time.perf_counter(), [499]  # stays where the client leaves before a response

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
        except _Disconnected:
            return
        except Exception:
            seen[0] = 500  # the server around this application sends it
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


class _Disconnected(Exception):
    """The client left before its request was complete."""


async def _body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The whole body. Raises ApiError 413 when it is too long, by its header or its size, and 408 when it does not arrive."""
    too_long = ApiError(413, f"the request is longer than the {limits.max_body_bytes} bytes allowed", code="request_too_large")
    length = _header(scope, b"content-length") or "0"
    if length.isdigit() and (len(length) > 18 or int(length) > limits.max_body_bytes):
        raise too_long
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Disconnected
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.max_body_bytes:
                    raise too_long
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, f"the request did not come within {limits.body_seconds:g} s", code="request_timeout") from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first, and then the real messages, such as a disconnect."""
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
