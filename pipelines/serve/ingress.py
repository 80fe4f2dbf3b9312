"""The OpenAI-compatible ingress: it parses requests, sends them to replicas, and formats responses.

Annotations are evaluated in this module, unlike elsewhere: Serve rebuilds the routes, and FastAPI would then read a request
model whose name is a string as a query parameter.
"""

import asyncio
import contextlib
import logging
import time
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

from pipelines.serve import webhook
from pipelines.serve.admission import Admission, bodies_at_once
from pipelines.serve.body_readers import BodyReaders
from pipelines.serve.following import Following, follower_of
from pipelines.serve.messages import AppArgs, Generation, Refusal
from pipelines.serve.metrics import FrontMetrics
from pipelines.serve.middleware import BODY_SECONDS, KNOWN, ROUTES, Limits, RequestMiddleware
from pipelines.serve.model_identity import ModelDigest
from pipelines.serve.openai.errors import ApiError, not_ready, queue_full, refused, too_slow
from pipelines.serve.openai.requests import ChatRequest, CompletionRequest
from pipelines.serve.openai.responses import CHAT, DONE, TEXT, Chunks, event, response
from pipelines.serve.owner import end_with
from pipelines.serve.relay import Relay
from pipelines.serve.replica_states import REPORT_SECONDS, states_of, together
from pipelines.serve.webhook import Deliveries

log = logging.getLogger("ray.serve")
PLAYGROUND = Path(__file__).with_name("playground.html")
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that tell proxies not to buffer events."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {}}}
    for status, text in ((400, "a bad request"), (401, "no key"), (404, "an unknown model"), (408, "too slow"),
                         (413, "too long"), (415, "not JSON"), (429, "a full queue"), (503, "not ready"),
                         (504, "no answer in time"))}

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
    message = str(first["msg"]).removeprefix("Value error, ")
    return JSONResponse(ApiError(400, f"{param or 'body'}: {message}", param).body(), 400)


@api.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    what = str(error.detail)
    if error.status_code in (404, 405):
        what = f"{request.method} {request.url.path}: {what.lower()}: there are {', '.join(ROUTES)}"
    return JSONResponse(ApiError(error.status_code, what).body(), error.status_code, headers=dict(error.headers or {}))


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


@serve.ingress(api)
class Ingress:
    """The HTTP ingress. It limits the answers in flight over all replicas, and answers from memory what it is asked of them."""

    def __init__(self, server: DeploymentHandle, args: AppArgs) -> None:
        self.args, self.admission, self.states = args, Admission(), states_of(server.app_name)
        self.relay = Relay(server, self.states, args.request_seconds)
        self.metrics = FrontMetrics()
        self.model: dict[str, Any] | None = None
        self.reporting: asyncio.Task[None] | None = None
        self.ending: asyncio.Task[None] | None = None
        self.name = server.app_name
        self.bodies = BodyReaders(bodies_at_once(args), BODY_SECONDS, args.max_body_bytes)
        self.following: Following | None = None
        self.looking: asyncio.Task[None] | None = None
        self.deliveries = None if args.webhook_secret is None else Deliveries(args.webhook_secret)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it before any request, and whenever the keys are changed."""
        RequestMiddleware.limits = Limits(self.bodies, tuple(user_config["api_key_digests"]), self.args.require_keys,
                                          tuple(self.args.cors_origins), self._count, self.deliveries is not None)
        if self.reporting is None:
            self.reporting = asyncio.create_task(self._report())
        if self.ending is None and self.args.owner is not None:
            self.ending = asyncio.create_task(end_with(self.args.owner, self.name, self._close, self.args.drain_seconds))

        if self.following is None and self.args.follow is not None:
            self.following = Following(follower_of(self.args), self.args.follow["seconds"], self.metrics)
            self.looking = asyncio.create_task(self.following.run())

    async def _report(self) -> None:
        while True:
            self.metrics.waiting(self.states.waiting())
            self.metrics.registry_answers(self.following.answers if self.following is not None else None)
            self._known()
            await asyncio.sleep(REPORT_SECONDS)

    def _count(self, route: str, status: int, seconds: float) -> None:
        self.metrics.request(route, status, seconds)
        log.info("request", extra={"route": route, "status": status, "seconds": round(seconds, 4)})

    def _known(self) -> dict[str, Any] | None:
        """What the running replicas told last, together; None where none has told anything."""
        infos = self.states.infos()
        if infos:
            self.model = together(infos)
        return self.model if infos else None

    async def state(self) -> dict[str, Any]:
        """For whoever started or updates the application."""
        limits = RequestMiddleware.limits
        return {"args": self.args, "api_key_digests": limits.key_digests if limits else (), "running": len(self.states.replicas),
                "replicas": self.states.infos(), "in_flight": self.admission.in_flight, "closing": self.admission.closing}

    async def close(self) -> int:
        """Accept no more requests. Returns the answers in flight."""
        return self._close()

    def _close(self) -> int:
        self.admission.closing = True
        return self.admission.in_flight

    @api.get("/health", responses=ERRORS)
    async def health(self) -> dict[str, str]:
        """Whether this ingress runs."""
        return {"status": "ok"}

    @api.get("/ready", responses=ERRORS)
    async def ready(self, request: Request) -> Any:
        """Whether requests are decoded now: a replica has its base, is warm and has not failed, and nobody is stopping the
        endpoint. With a valid key (or without keys) the answer also has the model and its `fingerprint`, the load of all replicas
        together, the heads that one of them rejected, how old this is, and the answers that are accepted here and not finished,
        now."""
        info = self._known()
        status = "starting" if info is None else "failed" if info["failed"] else "ready"
        if self.admission.closing:
            status = "closing"
        known = {} if info is None or not request.scope[KNOWN] else info | {
            "age_seconds": round(self.states.age(), 3), "accepted": self.admission.in_flight,
            "fingerprint": ModelDigest(info["base"], info["context_limit"], info["configuration"]).fingerprint}
        return JSONResponse({"status": status} | known, 200 if status == "ready" else 503)

    @api.get("/v1/models", responses=ERRORS)
    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    @api.get("/v1/models/{name:path}", responses=ERRORS)
    async def one_model(self, name: str) -> dict[str, Any]:
        self._check_model(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        self._known()
        info = self.model
        if info is None:
            raise not_ready("no replica is ready")
        return {"id": self.args.app_name, "object": "model", "created": 0, "owned_by": "hydra-heads", "base": info["base"],
                "configuration": info["label"], "version": info["version"], "digest": info["configuration"],
                "context_limit": info["context_limit"], "max_model_len": info["context_limit"]}

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

    @api.post(webhook.PATH, include_in_schema=False)
    async def registry_webhook(self, request: Request) -> Any:
        """A delivery of MLflow's: look at the registry at once. Which model that is the settings say, never the body."""
        if self.deliveries is None or self.following is None:
            raise HTTPException(404, "Not Found")
        given = (request.headers.get(name) for name in (webhook.SIGNATURE, webhook.TIMESTAMP, webhook.DELIVERY))
        self.deliveries.take(await request.body(), *given)
        self.following.wake()
        return JSONResponse({"status": "looking"}, 202)

    def _accept(self, body: CompletionRequest | ChatRequest, prefix: str, default: int) -> Generation:
        self.admission.check_open()
        self._check_model(body.model)
        body.refuse_unsupported()
        return replace(body.generation(prefix, self.args.max_new_tokens, default, self.args.max_batch_size),
                       arrived=time.time(), seconds=self.args.request_seconds)

    def _check_model(self, name: str) -> None:
        if name != self.args.app_name:
            raise ApiError(404, f"model {name[:60]!r} does not exist; {self.args.app_name!r} does", "model", "model_not_found")

    @contextlib.contextmanager
    def _slots(self, count: int) -> Iterator[None]:
        """Reserve room for `count` answers. Raises ApiError 429 when there is none, 503 when no replica can answer, 504 when it
        takes too long."""
        running = max(1, len(self.states.replicas))
        decoding = self.args.max_batch_size * running
        with self.admission.slots(count, self.args.room * running, decoding):
            try:
                yield
            except BackPressureError:
                raise queue_full(self.admission.in_flight, self.admission.retry_seconds(decoding)) from None
            except RayActorError:  # its unfinished answers are lost
                raise not_ready("the replica that answered has died; another one is being started") from None
            except DeploymentUnavailableError:
                raise not_ready("no replica can be started; the log says why") from None
            except TimeoutError:
                raise too_slow(self.args.request_seconds) from None

    def _checked(self, item: Any) -> Any:
        """`item` of a replica. Raises ApiError where it is a refusal."""
        if isinstance(item, Refusal):
            raise refused(item, self.admission.retry_seconds(self.args.max_batch_size * max(1, len(self.states.replicas))))
        return item

    async def _respond(self, kind: str, body: CompletionRequest | ChatRequest, generation: Generation) -> Any:
        if not body.stream:
            with self._slots(generation.n):
                found = self._checked(await self.relay.answers(generation))
            return response(kind, body.model, generation, found)
        events = self._events(Chunks(kind, body.model, generation), body.include_usage)
        first = await anext(events)  # a refusal comes before the first byte, while the status can still be set
        return StreamingResponse(_after(first, events), media_type="text/event-stream", headers=STREAM_HEADERS)

    async def _events(self, chunks: Chunks, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events of one response. Raises ApiError only before the first event."""
        begun = False
        try:
            items = self.relay.stream(chunks.generation)
            with self._slots(chunks.generation.n):
                async with contextlib.aclosing(items):
                    async for item in items:
                        text = chunks.of(self._checked(item))
                        begun = True
                        yield text
            if include_usage:
                yield chunks.usage()
        except Exception as error:
            if not begun:
                raise
            yield event((error if isinstance(error, ApiError) else _failed(error)).body())
        yield DONE
