"""The OpenAI-compatible ingress: it parses requests, sends them to replicas, and formats responses.

Annotations are evaluated in this module, unlike elsewhere: Serve rebuilds the routes, and FastAPI would then read a request
model whose name is a string as a query parameter.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from pipelines.serve.instance import together
from pipelines.serve.messages import AppArgs, Generation, Refusal
from pipelines.serve.metrics import FrontMetrics
from pipelines.serve.middleware import KNOWN, Limits, RequestMiddleware
from pipelines.serve.openai.errors import ApiError, not_ready, queue_full, refused
from pipelines.serve.openai.requests import ChatRequest, CompletionRequest
from pipelines.serve.openai.responses import CHAT, DONE, TEXT, Chunks, event, response

log = logging.getLogger("ray.serve")
PLAYGROUND = Path(__file__).with_name("playground.html")
READY_SECONDS, HEALTH_SECONDS = 5.0, 0.8
"""Time limits for replicas to answer `/ready` and `/health`; a health probe often waits for one second at most."""
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that tell proxies not to buffer events."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {}}}
    for status, text in ((400, "a bad request"), (401, "no key"), (404, "an unknown model"), (408, "too slow"),
                         (413, "too long"), (429, "a full queue"), (503, "not ready"))}

api = FastAPI(title="hydra-heads", description="OpenAI-compatible speculative decoding")
api.add_middleware(RequestMiddleware)


@api.get("/", include_in_schema=False)
async def playground() -> FileResponse:
    """The page in which to try the endpoint."""
    return FileResponse(PLAYGROUND, media_type="text/html")


@api.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


@api.exception_handler(RequestValidationError)
async def _malformed(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]  # a number: the position where the JSON is malformed
    param = place[0] if place and isinstance(place[0], str) else None
    return JSONResponse(ApiError(400, f"{param or 'body'}: {first['msg']}", param).body(), 400)


@api.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code,
                        headers=dict(error.headers or {}))


@api.exception_handler(Exception)
async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(_failed(error).body(), 500)


def _failed(error: Exception) -> ApiError:
    """The error that a client gets for a fault of the server; the details go to the log."""
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why")


async def _after(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Defined before the class, since Serve copies the globals of the routes when it decorates the class."""
    try:
        yield first
        async for item in events:
            yield item
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # frees the slot at once


@contextlib.contextmanager
def _cancelled_with_client(call: Any) -> Iterator[Any]:
    """A call to a replica, which is cancelled when the client leaves."""
    try:
        yield call
    except (asyncio.CancelledError, GeneratorExit):
        call.cancel()
        raise


@serve.ingress(api)
class Ingress:
    """The HTTP ingress. It limits the answers in flight over all replicas."""

    def __init__(self, server: DeploymentHandle, args: AppArgs) -> None:
        self.server, self.args, self.in_flight = server, args, 0
        self.metrics = FrontMetrics()
        RequestMiddleware.limits = Limits(args.max_body_bytes, tuple(args.api_key_digests), count=self._count)

    def _count(self, route: str, status: int, seconds: float) -> None:
        self.metrics.request(route, status)
        log.info("request", extra={"route": route, "status": status, "seconds": round(seconds, 4)})

    @api.get("/health", responses=ERRORS)
    async def health(self) -> Any:
        """Whether this ingress runs and no replica that answers has failed."""
        info = await self._info(HEALTH_SECONDS)
        if info is not None and info["failed"]:
            return JSONResponse({"status": "failed"}, 503)
        return {"status": "ok"}

    @api.get("/ready", responses=ERRORS)
    async def ready(self, request: Request) -> Any:
        """Whether requests are decoded now: a base is loaded and the warm-up is done. With a valid key (or without keys) the
        answer also has the model, the load of all replicas together, and the heads that one of them rejected."""
        info = await self._info(READY_SECONDS)
        if info is None or info["failed"]:
            return JSONResponse({"status": "starting" if info is None else "failed"}, 503)
        return {"status": "ready"} | (info if request.scope[KNOWN] else {})

    @api.get("/v1/models", responses=ERRORS)
    async def models(self) -> dict[str, Any]:
        info = await self._info(READY_SECONDS)
        if info is None:
            raise not_ready("no replica is ready")
        return {"object": "list", "data": [
            {"id": self.args.app_name, "object": "model", "created": 0, "owned_by": "hydra-heads", "base": info["base"],
             "configuration": info["label"], "version": info["version"], "digest": info["configuration"],
             "context_limit": info["context_limit"]}]}

    async def _info(self, seconds: float) -> dict[str, Any] | None:
        """The combined `info` of all replicas; None where none answers."""
        try:
            found = await self.server.broadcast("info").results_async(timeout_s=seconds, return_exceptions=True)
            return together([info for info in found if isinstance(info, dict)])
        except Exception as error:
            log.warning("no replica answers", extra={"why": f"{type(error).__name__}: {error}"[:200]})
            return None

    @api.post("/v1/completions", responses=ERRORS)
    async def completions(self, body: CompletionRequest) -> Any:
        generation = self._accept(body, "cmpl", 16)
        if isinstance(body.prompt, str):
            if not body.prompt:
                raise ApiError(400, "prompt: is empty", "prompt")
            generation = replace(generation, text=body.prompt)
        else:
            generation = replace(generation, prompt_ids=body.prompt)
        return await self._respond(TEXT, body, generation)

    @api.post("/v1/chat/completions", responses=ERRORS)
    async def chat(self, body: ChatRequest) -> Any:
        generation = replace(self._accept(body, "chatcmpl", self.args.max_new_tokens), messages=body.plain_messages())
        return await self._respond(CHAT, body, generation)

    def _accept(self, body: CompletionRequest | ChatRequest, prefix: str, default: int) -> Generation:
        if body.model != self.args.app_name:
            raise ApiError(404, f"model {body.model[:60]!r} does not exist; {self.args.app_name!r} does", "model",
                           "model_not_found")
        body.refuse_unsupported()
        return body.generation(prefix, self.args.max_new_tokens, default, self.args.max_batch_size)

    @contextlib.contextmanager
    def _slots(self, count: int) -> Iterator[None]:
        """Reserve room for `count` answers. Raises ApiError 429 when there is none, 503 when no replica can answer."""
        if self.in_flight + count > self.args.room * max(self.args.replicas, self.args.max_replicas or 0):
            raise queue_full(self.in_flight)
        self.in_flight += count
        try:
            yield
        except BackPressureError:
            raise queue_full(self.in_flight) from None
        except RayActorError:  # its unfinished answers are lost
            raise not_ready("the replica that answered has died; another one is being started") from None
        except DeploymentUnavailableError:
            raise not_ready("no replica can be started; the log says why") from None
        finally:
            self.in_flight -= count

    async def _respond(self, kind: str, body: CompletionRequest | ChatRequest, generation: Generation) -> Any:
        if not body.stream:
            with self._slots(generation.n), _cancelled_with_client(self.server.answers.remote(generation)) as answers:
                found = await answers
            if isinstance(found, Refusal):
                raise refused(found)
            return response(kind, body.model, generation, found)
        events = self._events(Chunks(kind, body.model, generation), body.include_usage)
        first = await anext(events)  # a refusal comes before the first byte, while the status can still be set
        return StreamingResponse(_after(first, events), media_type="text/event-stream", headers=STREAM_HEADERS)

    async def _events(self, chunks: Chunks, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events of one response. Raises ApiError only before the first event."""
        begun = False
        try:
            stream = self.server.options(stream=True).stream
            with self._slots(chunks.generation.n), _cancelled_with_client(stream.remote(chunks.generation)) as items:
                async for item in items:
                    if isinstance(item, Refusal):
                        raise refused(item)
                    begun = True
                    yield chunks.of(item)
            if include_usage:
                yield chunks.usage()
        except Exception as error:
            if not begun:
                raise
            yield event((error if isinstance(error, ApiError) else _failed(error)).body())
        yield DONE
