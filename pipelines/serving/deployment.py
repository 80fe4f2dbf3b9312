"""The two deployments: replicas that decode, and the OpenAI-compatible front.

Annotations are evaluated here, unlike elsewhere: Serve rebuilds the routes, and FastAPI then reads a request model that
is only named in a string as a query parameter.
"""

import logging
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from hydra_core.base import load_base
from hydra_core.decoding import Engine, Result, TextStream, load_heads
from hydra_core.decoding import Request as EngineRequest
from hydra_core.errors import InputError
from pipelines.machine_costs import machine_costs
from pipelines.quiet import speak
from pipelines.serving.host import EngineHost
from pipelines.serving.identity import Serving, configuration_digest
from pipelines.serving.openai_api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    chunk,
    response,
    usage_chunk,
)
from pipelines.serving.records import Answer, AppArgs, Generation, Refusal, is_text

log = logging.getLogger("ray.serve")


class DecodeServer:
    """One replica: one base, one engine, one running batch."""

    def __init__(self, args: AppArgs) -> None:
        speak()
        torch.set_num_threads(args.threads)
        self.args = args
        base = args.base
        self.base = load_base(base["model"], dtype=base["dtype"], device=base["device"], cache=Path(args.cache),
                              context_limit=base["context_limit"])
        self.serving = Serving(str(self.base.identity), self.base.context_limit, configuration_digest(args.configuration))
        costs = partial(machine_costs, self.base, Path(args.cache))
        drafter, trees = load_heads(args.configuration, self.base, costs) if args.configuration else (None, None)
        self.host = EngineHost(Engine(self.base, drafter, trees, max_batch=args.max_batch))
        self.in_flight = 0

    async def generate(self, generation: Generation) -> Answer | Refusal:
        """The whole answer at once."""
        async for item in self.stream(generation):
            if not isinstance(item, str):
                return item
        raise RuntimeError("the stream ended without an answer")

    async def stream(self, generation: Generation) -> AsyncIterator[str | Answer | Refusal]:
        """Pieces of text, then the answer; or one refusal. Leaving early frees the row."""
        if self.in_flight >= self.args.max_batch + self.args.max_queued:
            yield Refusal(429, f"{self.in_flight} requests are in flight already: try again later")
            return
        self.in_flight += 1
        try:
            async for item in self._decode(generation):
                yield item
        except InputError as error:
            yield Refusal(400, str(error).removeprefix(f"request {generation.id}: "))
        finally:
            self.in_flight -= 1

    async def _decode(self, generation: Generation) -> AsyncIterator[str | Answer]:
        started = time.perf_counter()
        request = EngineRequest(generation.id, tuple(self._prompt_ids(generation)), generation.max_new_tokens,
                                generation.temperature, generation.seed)
        text = TextStream(self.base.decode, generation.stop)
        tokens: list[int] = []
        result: Result | None = None
        steps = -1  # the first output comes with the prompt
        outputs = self.host.stream(request)
        try:
            async for output in outputs:
                tokens += output.token_ids
                if piece := text.push(output.token_ids):
                    yield piece
                result, steps = output.result, steps + 1
                if text.stopped:
                    break
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]  # frees the row at once
        if piece := text.finish():
            yield piece
        yield _answer(generation.id, request, text, tokens, result, steps, time.perf_counter() - started)

    def _prompt_ids(self, generation: Generation) -> list[int]:
        if generation.prompt_ids is not None:
            return generation.prompt_ids
        if not is_text([generation.prompt, generation.text, generation.messages]):
            field = "prompt" if generation.messages is None else "messages"
            raise InputError(f"{field}: holds half a character (a lone surrogate)")
        if generation.text is not None:
            if self.base.tokenizer is None:
                raise InputError("prompt: the base has no tokenizer: give token ids")
            return list(self.base.tokenizer(generation.text).input_ids)
        return self.base.encode_prompt(generation.prompt, generation.messages)

    async def info(self) -> dict[str, Any]:
        """What serves, and how busy it is."""
        return {"label": self.args.label, **asdict(self.serving), "in_flight": self.in_flight,
                "running": self.host.running, "slots": self.args.max_batch}

    def check_health(self) -> None:
        """Raises when the engine has failed, so that Serve replaces the replica."""
        if self.host.failure is not None:
            raise RuntimeError("the engine has failed") from self.host.failure


def _answer(request_id: str, request: EngineRequest, text: TextStream, tokens: list[int], result: Result | None,
            steps: int, seconds: float) -> Answer:
    """An answer cut at a stop string leaves the engine early: what it had drafted is then not known."""
    ended = "stop" if text.stopped or result is None else result.finish_reason
    accepted = result.accepted if result else max(0, len(tokens) - 1 - steps)
    return Answer(request_id, text.sent, tuple(tokens), ended, len(request.prompt_ids), steps,
                  result.drafted if result else None, accepted, seconds)


api = FastAPI(title="hydra-heads", description="OpenAI-compatible speculative decoding")


@api.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=error.headers)


@api.exception_handler(RequestValidationError)
async def _malformed(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    return JSONResponse(ApiError(400, f"{param or 'body'}: {first['msg']}", param).body(), 400)


@api.exception_handler(Exception)
async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.exception("a request failed")
    return JSONResponse(ApiError(500, "the server failed; its log says why").body(), 500)


def _refused(refusal: Refusal) -> ApiError:
    if refusal.status == 429:
        return ApiError(429, refusal.message, code="queue_full", headers={"Retry-After": "1"})
    return ApiError(refusal.status, refusal.message, refusal.message.split(":")[0] or None)


@serve.ingress(api)
class Ingress:
    """The HTTP front: shapes in, shapes out; decoding is the replicas' business."""

    def __init__(self, server: DeploymentHandle, args: AppArgs) -> None:
        self.server, self.args = server, args

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/ready")
    async def ready(self) -> dict[str, Any]:
        return {"status": "ready"} | await self.server.info.remote()

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        info = await self.server.info.remote()
        return {"object": "list", "data": [{"id": self.args.app_name, "object": "model", "created": 0,
                                            "owned_by": "hydra-heads", "configuration": info["label"], "base": info["base"]}]}

    @api.post("/v1/completions")
    async def completions(self, body: CompletionRequest) -> Any:
        generation = self._accept(body, body.max_tokens, 16)
        if isinstance(body.prompt, str):
            if not body.prompt:
                raise ApiError(400, "prompt: is empty", "prompt")
            generation = replace(generation, text=body.prompt)
        else:
            generation = replace(generation, prompt_ids=body.prompt)
        return await self._respond("text_completion", body, generation)

    @api.post("/v1/chat/completions")
    async def chat(self, body: ChatRequest) -> Any:
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        generation = replace(self._accept(body, limit, self.args.max_new_tokens), messages=body.plain_messages())
        return await self._respond("chat.completion", body, generation)

    def _accept(self, body: CompletionRequest | ChatRequest, max_tokens: int | None, default: int) -> Generation:
        if body.model != self.args.app_name:
            raise ApiError(404, f"model {body.model!r} does not exist; {self.args.app_name!r} does", "model", "model_not_found")
        body.refuse_unsupported()
        return body.generation(max_tokens, self.args.max_new_tokens, min(default, self.args.max_new_tokens))

    async def _respond(self, kind: str, body: CompletionRequest | ChatRequest, generation: Generation) -> Any:
        if not body.stream:
            found = await self.server.generate.remote(generation)
            if isinstance(found, Refusal):
                raise _refused(found)
            return response(kind, body.model, found)
        pieces = self.server.options(stream=True).stream.remote(generation)
        first = await anext(aiter(pieces))
        if isinstance(first, Refusal):  # before the first byte: still time for a status code
            raise _refused(first)
        return StreamingResponse(self._events(kind, body, generation.id, first, pieces), media_type="text/event-stream")

    async def _events(self, kind: str, body: CompletionRequest | ChatRequest, request_id: str, first: Any,
                      rest: Any) -> AsyncIterator[str]:
        created, opened, item = int(time.time()), False, first
        while True:
            if isinstance(item, Answer):
                yield chunk(kind, body.model, request_id, created, None, item, first=not opened)
                if body.include_usage:
                    yield usage_chunk(kind, body.model, request_id, created, item)
                break
            yield chunk(kind, body.model, request_id, created, item, first=not opened)
            opened = True
            item = await anext(aiter(rest))
        yield "data: [DONE]\n\n"


def build(args: AppArgs) -> serve.Application:
    """An unstarted application: replicas sized to the engine's rows, and the front."""
    server = serve.deployment(DecodeServer).options(
        name="DecodeServer", num_replicas=args.replicas, max_ongoing_requests=args.max_batch + args.max_queued + 16,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus}, graceful_shutdown_timeout_s=10)
    front = serve.deployment(Ingress).options(
        name="Ingress", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=10)
    return front.bind(server.bind(args), args)
