"""The backend that sends rows to an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import time
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from hydra_core.errors import InputError, StoppedError
from pipelines.batch.backend import RequestSettings, Response
from pipelines.batch.http_client import HttpAnswer, HttpClient, NoAnswer
from pipelines.batch.made_by import MadeBy
from pipelines.batch.openai_format import request_of
from pipelines.batch.reader import BatchRow
from pipelines.batch.retry import TRIES, GivenUp, Overloaded, RetryPolicy, TooSlow
from pipelines.serve.messages import is_text
from pipelines.serve.openai.errors import printable

BUSY = (408, 425, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529)
"""HTTP statuses of a full queue, and of a proxy whose server is starting or away; those above 511 are of large proxies."""
TIMEOUT = "timeout"
"""The code of our own endpoint's 504: it was there, and the answer took longer than it allows."""
Count = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Text = Annotated[str, Field(strict=True)]


class _Message(BaseModel):
    content: Text | None = None


class _Choice(BaseModel):
    message: _Message | None = None
    text: Text | None = None
    finish_reason: Text | None = None


class _Speculative(BaseModel):
    steps: Count | None = None
    drafted: Count | None = None
    accepted: Count | None = None
    tokens_per_step: float | None = None


class _Usage(BaseModel):
    completion_tokens: Count | None = None
    speculative: _Speculative | None = None


class _Completion(BaseModel):
    """An answer in OpenAI's format, as far as it becomes columns."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None
    model: Text | None = None
    system_fingerprint: Text | None = None


class HttpBackend:
    """Sends rows to an OpenAI-compatible endpoint; a row in OpenAI's format is sent as it is."""

    def __init__(self, settings: RequestSettings) -> None:
        self.settings, self.where = settings, f"batch.address={settings.address}"
        self.client = HttpClient(str(settings.address), api_key(settings.key_variable))
        self.retry_policy = RetryPolicy(self.where, settings.row_seconds)
        self._made_by = MadeBy(self.where, settings.serves, settings.made_by, settings.any_model)

    @property
    def made_by(self) -> str:
        return str(self._made_by)

    def stop(self) -> None:
        self.retry_policy.stop()
        self.client.close()

    def ask(self, row: BatchRow) -> Response:
        settings = self.settings
        url, body = request_of(row, settings.model, settings.max_new_tokens, settings.temperature, settings.seed)
        started = time.perf_counter()
        try:
            for tried in range(TRIES):
                status, found = self.retry_policy.wait(lambda: self._once(url, body))
                if status < 500:
                    break
                self.retry_policy.pause(1.0 + tried)
        except GivenUp as error:
            return _failed(504, str(error))
        if status != 200:
            self._check_refusal(status, found, str(body["model"]))
            return Response(status, _error_message(found), body=found)
        return self._response(found, str(body["model"]), time.perf_counter() - started)

    def _response(self, found: dict[str, Any], asked: str, seconds: float) -> Response:
        try:
            answer = _Completion.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            return _failed(502, f"the endpoint's answer is not in OpenAI's format ({where}: {first['msg']})")
        choice, usage = answer.choices[0], answer.usage or _Usage()
        if choice.message is None and choice.text is None:
            return _failed(502, "the endpoint's answer is not in OpenAI's format (choices.0: neither message nor text)")
        self._made_by.check(answer.system_fingerprint, asked, answer.model)
        counts = usage.speculative or _Speculative()
        text = choice.text if choice.message is None else choice.message.content
        return Response(200, columns={
            "text": text or "", "token_ids": None, "tokens": usage.completion_tokens, "finish_reason": choice.finish_reason,
            "steps": counts.steps, "drafted": counts.drafted, "accepted": counts.accepted,
            "tokens_per_step": counts.tokens_per_step, "latency_seconds": seconds}, body=found)

    def _once(self, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        try:
            answer = self.client.post(url, body, self.settings.row_seconds)
        except NoAnswer as error:
            raise (TooSlow if error.slow else Overloaded)(str(error)) from None
        found = _object(answer)
        if answer.status == 504 and _error_code(found) == TIMEOUT:
            raise TooSlow(f"504 {_error_message(found)}", "serve.request_seconds of the endpoint")
        if answer.status in BUSY:
            raise Overloaded(f"{answer.status} {_text(answer)}", seconds_of(answer.headers.get("retry-after")))
        if 300 <= answer.status < 400:
            raise Overloaded(f"{answer.status}, it redirects to {answer.headers.get('location', '?')}")
        if answer.status == 404 and found is None:  # the server in front, while the endpoint behind it stops or starts
            raise Overloaded(f"404 {_text(answer)}")
        if found is None:
            found = {"error": {"message": _text(answer) or f"{answer.status} without a body"}}
            return (502 if answer.status == 200 else answer.status), found
        return answer.status, found

    def _check_refusal(self, status: int, found: dict[str, Any], asked: str) -> None:
        """Raise StoppedError for a refusal that meets every row alike: the endpoint is not the one that was looked at first."""
        if status == 401:
            raise StoppedError(f"{self.where}: refuses the key now ({_error_message(found)}): set batch.key_variable and run "
                               "again; every row that was answered is kept")
        if status == 404 and _error_code(found) == "model_not_found" and asked == self.settings.model:
            raise StoppedError(f"{self.where}: does not serve {asked!r} any more ({_error_message(found)}): start it there again "
                               "and run again; every row that was answered is kept")


def api_key(variable: str | None) -> dict[str, str]:
    """The header with the API key in environment variable `variable`. Raises InputError when it is not set, and for a key
    that no header can hold."""
    if variable is None:
        return {}
    if not (key := os.environ.get(variable, "").strip()):
        raise InputError(f"batch.key_variable={variable}: that environment variable is not set")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"batch.key_variable={variable}: that environment variable holds characters that no key has")
    return {"Authorization": f"Bearer {key}"}


def seconds_of(text: str | None) -> float | None:
    """The seconds that a `Retry-After` header asks for, as a number or as a date; None for none, or for another text."""
    if text is None:
        return None
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _failed(status: int, message: str) -> Response:
    return Response(status, message, body={"error": {"message": message}})


def _error_message(body: dict[str, Any] | None) -> str:
    error = (body or {}).get("error")
    return printable(str(error.get("message")) if isinstance(error, dict) else json.dumps(body)[:200])


def _error_code(body: dict[str, Any] | None) -> Any:
    error = (body or {}).get("error")
    return error.get("code") if isinstance(error, dict) else None


def _object(answer: HttpAnswer) -> dict[str, Any] | None:
    """The answer's JSON object; None for anything else, and for one that no file could hold."""
    try:
        value = answer.value()
    except ValueError:
        return None
    return value if isinstance(value, dict) and is_text(value) else None


def _text(answer: HttpAnswer) -> str:
    return printable(" ".join(answer.raw[:400].decode(errors="replace").split())[:200])
