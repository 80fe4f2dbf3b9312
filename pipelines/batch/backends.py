"""The backends that answer rows of `batch`: the deployment's handle, an endpoint over HTTP, or an engine in this process.

A request waits while the queue is full and while Serve replaces a replica that died. A row that cannot be answered gets a
response that says why.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from hydra_core.errors import InputError
from pipelines.batch.openai_format import generation_of, request_of
from pipelines.batch.reader import URLS, BatchRow
from pipelines.serve.messages import Answer, AppArgs, Generation, Refusal
from pipelines.serve.openai.errors import ApiError
from pipelines.serve.openai.responses import CHAT, TEXT, response
from pipelines.serve.replica import DecodeServer
from pipelines.serve.user_config import heads_of

LONGEST_WAIT = 5.0     # seconds between two tries while a queue is full
PATIENCE = 600.0       # seconds without any answer after which the backend counts as gone
TRIES = 3              # for a row at which the server itself fails
BUSY = (429, 502, 503, 504)
"""HTTP statuses of a full queue, and of a proxy whose server is starting."""


@dataclass(frozen=True)
class RequestSettings:
    """How rows become requests, and where they go; plain values. One of `app_name`, `address` and `embedded` is given. `model`:
    the name in a request; `most_choices`: the maximum of `n`, the answers of one row."""

    model: str
    max_new_tokens: int
    temperature: float
    seed: int
    most_choices: int = 1
    app_name: str | None = None
    address: str | None = None
    key_variable: str | None = None
    embedded: AppArgs | None = None


@dataclass(frozen=True)
class Response:
    """The response to one row. `status` 200: `columns` hold the answer; else `message` says why there is none. `body`: the
    response or error in OpenAI's format, for a row in that format."""

    status: int
    message: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | None = None


class Backend(Protocol):
    """Answers one row; many threads call it at once."""

    retry_policy: RetryPolicy

    def ask(self, row: BatchRow) -> Response: ...


Answers = Callable[[Generation], list[Answer] | Refusal]
"""All answers to one request, or the reason why there are none."""


class ServerError(Exception):
    """The server itself failed, at this row or at another one in the same batch."""


class Overloaded(Exception):
    """The server has no room now: try again after `seconds`; None: the caller chooses."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


def open_backend(settings: RequestSettings) -> Backend:
    """The backend that `settings` names. Raises InputError for an API key that is not set."""
    if settings.address:
        return HttpBackend(settings)
    return DeploymentBackend(settings, _embedded(settings.embedded) if settings.embedded else _deployment(str(settings.app_name)))


class DeploymentBackend:
    """Sends a `Generation` to the deployment, or to an engine of this process."""

    def __init__(self, settings: RequestSettings, answers: Answers) -> None:
        self.settings, self.answers = settings, answers
        self.retry_policy = RetryPolicy("the deployment")
        self._suspect = threading.Lock()

    def ask(self, row: BatchRow) -> Response:
        settings = self.settings
        try:
            generation = generation_of(row, settings.model, settings.max_new_tokens, settings.temperature, settings.seed,
                                       settings.most_choices)
        except ApiError as error:
            return Response(error.status, error.message, body=error.body())
        found = self._with_retries(generation)
        if isinstance(found, Refusal):
            return Response(found.status, found.message, body=ApiError(found.status, found.message).body())
        kind = CHAT if row.url == URLS[0] else TEXT
        body = response(kind, settings.model, generation, found) if row.body is not None else None
        return Response(200, columns=_answer_columns(found[0]), body=body)

    def _with_retries(self, generation: Generation) -> list[Answer] | Refusal:
        """Wait while the queue is full or a replica is replaced, and retry after a server error, `TRIES` times in all.

        An error fails every request in flight. They are retried one at a time, so that a row that causes the error uses up
        its own tries and those of no other row.
        """
        try:
            return self._answers(generation)
        except ServerError as error:
            why = str(error)
        with self._suspect:
            for tried in range(1, TRIES):
                time.sleep(tried)
                try:
                    return self._answers(generation)
                except ServerError as error:
                    why = str(error)
        return Refusal(500, f"the server failed {TRIES} times: {why}")

    def _answers(self, generation: Generation) -> list[Answer] | Refusal:
        found: list[Answer] | Refusal = self.retry_policy.wait(lambda: self._once(generation))
        return found

    def _once(self, generation: Generation) -> list[Answer] | Refusal:
        # a new id: an earlier request of this row may still be decoding, from a killed job or before its replica died
        found = self.answers(replace(generation, id=f"{generation.id}-{uuid.uuid4().hex}"))
        if isinstance(found, Refusal) and found.in_flight:  # this row may be the reason: it is not asked again for ever
            raise ServerError(found.message)
        if isinstance(found, Refusal) and found.status in (429, 503):
            raise Overloaded(found.message)
        return found


def _answer_columns(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "token_ids": list(answer.token_ids), "tokens": len(answer.token_ids),
            "finish_reason": answer.finish_reason, "steps": answer.steps, "drafted": answer.drafted,
            "accepted": answer.accepted, "tokens_per_step": answer.tokens_per_step, "latency_seconds": answer.latency_seconds}


def _deployment(app_name: str) -> Answers:
    handle = serve.get_deployment_handle("DecodeServer", app_name)

    def answers(generation: Generation) -> list[Answer] | Refusal:
        try:
            found: list[Answer] | Refusal = handle.answers.remote(generation).result()
            return found
        except (BackPressureError, RayActorError, DeploymentUnavailableError) as error:
            raise Overloaded(_first_line(error)) from None
        except RayTaskError as error:
            raise ServerError(_first_line(error.cause or error)) from None

    return answers


def _embedded(args: AppArgs) -> Answers:
    """An engine in this process, with an event loop in a thread of its own."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it logs each answer, which is meant for a server's log
    server, loop, restarting = DecodeServer(args), asyncio.new_event_loop(), threading.Lock()
    threading.Thread(target=loop.run_forever, name="embedded", daemon=True).start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    def answers(generation: Generation) -> list[Answer] | Refusal:
        with restarting:
            if server.failed:
                run(server.restart())
        try:
            found: list[Answer] | Refusal = run(server.answers(generation))
        except RuntimeError as error:
            raise ServerError(_first_line(error)) from None
        return found

    run(server.reconfigure(heads_of(args)))
    return answers


class HttpBackend:
    """Sends rows to an OpenAI-compatible endpoint; a row in OpenAI's format is sent as it is."""

    def __init__(self, settings: RequestSettings) -> None:
        self.settings = settings
        self.headers = {"Content-Type": "application/json"} | api_key(settings.key_variable)
        self.retry_policy = RetryPolicy(f"batch.address={settings.address}")

    def ask(self, row: BatchRow) -> Response:
        settings = self.settings
        url, body = request_of(row, settings.model, settings.max_new_tokens, settings.temperature, settings.seed)
        started = time.perf_counter()
        for tried in range(TRIES):
            status, found = self.retry_policy.wait(lambda: self._once(url, body))
            if status < 500:
                break
            time.sleep(1 + tried)
        if status != 200:
            return Response(status, _error_message(found), body=found)
        try:
            return Response(200, columns=_columns(found, time.perf_counter() - started), body=found)
        except (KeyError, IndexError, TypeError):
            return Response(500, "the endpoint's answer is not in OpenAI's format", body=found)

    def _once(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        address = str(self.settings.address).rstrip("/")
        request = urllib.request.Request(f"{address}{url}", json.dumps(body).encode(), self.headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return 200, _object(answer.read())
        except urllib.error.HTTPError as error:
            if error.code in BUSY:
                raise Overloaded(str(error), _seconds(error.headers.get("Retry-After"))) from None
            return error.code, _object(error.read())
        except (OSError, http.client.HTTPException) as error:
            raise Overloaded(_first_line(error)) from None


def api_key(variable: str | None) -> dict[str, str]:
    """The header with the API key in environment variable `variable`. Raises InputError when it is not set."""
    if variable is None:
        return {}
    if not (key := os.environ.get(variable, "").strip()):
        raise InputError(f"batch.key_variable={variable}: that environment variable is not set")
    return {"Authorization": f"Bearer {key}"}


class RetryPolicy:
    """How long requests wait for a backend without room; shared by all threads.

    `backend`: its name in messages; `stopped`: no thread waits any longer.
    """

    def __init__(self, backend: str) -> None:
        self.backend, self.last_answer, self.stopped = backend, time.monotonic(), False

    def wait(self, ask: Callable[[], Any]) -> Any:
        """The result of `ask`, called again while it raises Overloaded. Raises InputError after `PATIENCE` seconds without any
        answer to any thread."""
        wait = 0.1
        while True:
            try:
                found = ask()
                self.last_answer = time.monotonic()
                return found
            except Overloaded as overloaded:
                if self.stopped or time.monotonic() - self.last_answer > PATIENCE:
                    raise InputError(f"{self.backend}: has answered nothing for {PATIENCE:.0f} s ({overloaded}): run again "
                                     "when it does") from None
                time.sleep(min(wait if overloaded.seconds is None else overloaded.seconds, LONGEST_WAIT))
                wait = min(2 * wait, LONGEST_WAIT)


def _columns(body: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The columns of an answer as far as OpenAI's format has them; it has no token ids."""
    choice, usage = body["choices"][0], body.get("usage") or {}
    counts = usage.get("speculative") or {}
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return {"text": text or "", "token_ids": None, "tokens": usage.get("completion_tokens"),
            "finish_reason": choice.get("finish_reason"), "steps": counts.get("steps"), "drafted": counts.get("drafted"),
            "accepted": counts.get("accepted"), "tokens_per_step": counts.get("tokens_per_step"), "latency_seconds": seconds}


def _error_message(body: dict[str, Any]) -> str:
    error = body.get("error")
    return str(error.get("message")) if isinstance(error, dict) else json.dumps(body)[:200]


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError:
        value = raw.decode(errors="replace")[:200]
    return value if isinstance(value, dict) else {"error": {"message": str(value)}}


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdigit() else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
