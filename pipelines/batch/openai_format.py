"""Rows of `batch` as requests, to the engine or in OpenAI's format over HTTP; responses as lines of its Batch format."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from pipelines.batch.reader import URLS, BatchRow
from pipelines.rows.schemas import content_id
from pipelines.serve.messages import Generation
from pipelines.serve.openai.errors import ApiError
from pipelines.serve.openai.requests import ChatRequest, CompletionRequest

CHAT, COMPLETION = URLS
LIMITS = ("max_tokens", "max_completion_tokens")
STREAMING = ("stream", "stream_options")
"""Parameters that change how an answer is delivered; a batch always takes it whole."""


def generation_of(row: BatchRow, model: str, max_new_tokens: int, temperature: float, seed: int,
                  most_choices: int) -> Generation:
    """The engine's request. A row in OpenAI's format has its own settings; `max_new_tokens` and `seed` are the defaults for
    those that it omits. Raises ApiError for a body that the endpoint would refuse."""
    if row.body is None:
        prompt = row.prompt if row.messages is None and row.prompt_ids is None else None
        return Generation(f"batch-{row.id}", max_new_tokens, temperature, row_seed(seed, row.id), messages=row.messages,
                          prompt_ids=row.prompt_ids, prompt=prompt)
    body = _body(row.body, model, row_seed(seed, row.id), max_new_tokens)
    if body["model"] != model:
        raise ApiError(404, f"model {body['model']!r} does not exist; {model!r} does", "model", "model_not_found")
    try:
        if row.url == CHAT:
            request: ChatRequest | CompletionRequest = ChatRequest.model_validate(body)
        else:
            request = CompletionRequest.model_validate(body)
        request.refuse_unsupported()
        given = ({"messages": request.plain_messages()} if isinstance(request, ChatRequest) else _prompt(request.prompt))
        limit = max(max_new_tokens, request.max_tokens or 0, getattr(request, "max_completion_tokens", 0) or 0)
        generation = request.generation("batch", limit, max_new_tokens, most_choices)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"]) or None
        raise ApiError(400, f"{param or 'body'}: {first['msg']}", param) from None
    return replace(generation, id=f"batch-{row.id}", **given)


def row_seed(seed: int, row_id: str) -> int:
    """The seed of one row: with one seed for all, rows with equal prompts would "sample" equal answers."""
    return (seed + int(content_id("batch", row_id)[:8], 16)) % 2**63


def request_of(row: BatchRow, model: str, max_new_tokens: int, temperature: float, seed: int) -> tuple[str, dict[str, Any]]:
    """Path and body of the HTTP request."""
    if row.body is not None:
        return str(row.url), _body(row.body, model, row_seed(seed, row.id), max_new_tokens)
    settings = {"model": model, "max_tokens": max_new_tokens, "temperature": temperature, "seed": row_seed(seed, row.id)}
    if row.prompt_ids is not None:
        return COMPLETION, settings | {"prompt": row.prompt_ids}
    return CHAT, settings | {"messages": row.messages or [{"role": "user", "content": row.prompt}]}


def output_line(row_id: str, status: int, body: dict[str, Any] | None, message: str = "",
                bad_row: int | None = None) -> dict[str, Any]:
    """One line of a Batch output or errors file; status 0: the row was never sent.

    `bad_row`: number of a row that is not a request; several of them may have one id, or that of a good row.
    """
    request_id = content_id("batch", row_id) if bad_row is None else content_id("batch", "bad row", bad_row)
    answered = None if not status else {"status_code": status, "request_id": f"req_{request_id}", "body": body or {}}
    error = None if status == 200 else {"code": "invalid_row" if not status else f"status_{status}", "message": message}
    return {"id": f"batch_req_{request_id}", "custom_id": row_id, "response": answered, "error": error}


def _body(body: dict[str, Any], model: str, seed: int, max_new_tokens: int) -> dict[str, Any]:
    """The request completed by defaults, so that every server decodes it alike; a fixed seed makes an answer reproducible. A
    field that is null counts as one that is left out."""
    given = {name: value for name, value in body.items() if value is not None and name not in STREAMING}
    limit = {} if any(name in given for name in LIMITS) else {"max_tokens": max_new_tokens}
    return {"model": model, "seed": seed} | given | limit


def _prompt(prompt: str | list[int]) -> dict[str, Any]:
    if not prompt:
        raise ApiError(400, "prompt: is empty", "prompt")
    return {"text": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}
