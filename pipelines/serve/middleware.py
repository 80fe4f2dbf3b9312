"""The ASGI middleware that every request passes first: web pages of other origins, API key, kind and body of the request; it also
counts responses."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

from starlette.middleware.cors import CORSMiddleware

from pipelines.serve.api_keys import opens
from pipelines.serve.body_readers import BodyReaders, Disconnected, Receive
from pipelines.serve.openai.errors import ApiError
from pipelines.serve.webhook import MOST_BYTES
from pipelines.serve.webhook import PATH as WEBHOOK

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
OPEN = ("/", "/health", "/ready")
"""Paths that need no key: probes, and the page that a browser opens first. None of them decodes."""
KNOWN = "hydra_heads.known"
"""In a request's scope: whether the client has a valid key, and so may see more than a probe needs."""
ROUTES = (*OPEN, "/v1/models", "/v1/completions", "/v1/chat/completions")
BODY_SECONDS = 10.0


@dataclass(frozen=True)
class Limits:
    """Limits of requests. `bodies`: reads bodies; `key_digests`: empty: no key is needed, unless `require_keys`, which then lets
    nobody in; `origins`: of web pages that may ask, `*`: all; `count`: called with the route, status and seconds of each
    request; `webhook`: whether MLflow's deliveries are taken, which have a signature and no key."""

    bodies: BodyReaders
    key_digests: tuple[str, ...] = ()
    require_keys: bool = False
    origins: tuple[str, ...] = ()
    count: Callable[[str, int, float], None] = lambda route, status, seconds: None
    webhook: bool = False

    def opened_by(self, authorization: str | None) -> bool:
        """Whether that header opens the endpoint."""
        return (not self.key_digests and not self.require_keys) or opens(authorization, self.key_digests)


class RequestMiddleware:
    """Checks key and body of each request. Serve creates the application before the ingress has its arguments, so every request
    gets 503 until the ingress sets `limits`."""

    limits: ClassVar[Limits | None] = None

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = RequestMiddleware.limits
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif limits is None:
            await _send(ApiError(503, "the server is starting: try again later", headers={"Retry-After": "1"}), send)
        elif limits.origins:  # a browser asks first, without a key, and wants to see errors too
            await CORSMiddleware(self._checked, allow_origins=limits.origins, allow_methods=("GET", "POST"),  # type: ignore[arg-type]
                                 allow_headers=("*",), expose_headers=("Retry-After",))(scope, receive, send)
        else:
            await self._checked(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = RequestMiddleware.limits
        assert limits is not None
        began, seen = time.perf_counter(), [499]  # stays where the client leaves before a response

        async def counting(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                seen[0] = message["status"]
            await send(message)

        try:
            _check_key(scope, limits)
            await self.app(scope, _replayed(await _body(scope, receive, limits), receive), counting)
        except ApiError as error:
            await _send(error, counting)
        except Disconnected:
            return
        except Exception:
            seen[0] = 500  # the server around this application sends it
            raise
        finally:
            limits.count(_route(scope["path"]), seen[0], time.perf_counter() - began)


def _route(path: str) -> str:
    """A path as metrics name it: one of few."""
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in (*ROUTES, WEBHOOK) else "other"


def _check_key(scope: Scope, limits: Limits) -> None:
    given = _header(scope, b"authorization")
    scope[KNOWN] = limits.opened_by(given)
    if not scope[KNOWN] and scope["path"] not in OPEN and not (limits.webhook and scope["path"] == WEBHOOK):
        raise ApiError(401, "an API key is needed: Authorization: Bearer KEY" if given is None else
                       "the API key is not one of this server's", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def _body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The body of a request that needs one; what comes with any other is not waited for."""
    if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE") or scope["path"] in OPEN:
        return b""
    encoding = (_header(scope, b"content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise ApiError(415, f"Content-Encoding: {encoding[:40]} is not read here: send the body as plain JSON")
    kind = (_header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    if scope["path"] in ROUTES and not (kind.startswith("application/") and kind.endswith(("/json", "+json"))):
        raise ApiError(415, f"Content-Type: {kind[:40] or 'none'}: send the body as Content-Type: application/json")
    most = MOST_BYTES if scope["path"] == WEBHOOK else None
    return await limits.bodies.read(_header(scope, b"content-length"), receive, most)


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
