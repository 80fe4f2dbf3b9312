"""OpenAI's request and response shapes, as far as they are served here; anything else is refused by name."""

from __future__ import annotations

import json
import math
import time
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipelines.serving.records import Answer, Generation

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "best_of": (None, 1), "top_p": (None, 1, 1.0), "presence_penalty": (None, 0, 0.0),
    "frequency_penalty": (None, 0, 0.0), "logit_bias": (None, {}), "logprobs": (None, False), "top_logprobs": (None,),
    "echo": (None, False), "suffix": (None, ""), "tools": (None, []), "tool_choice": (None, "none", "auto"),
    "functions": (None, []), "function_call": (None, "none", "auto"), "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]), "audio": (None,),
}
"""Parameters that would change the answer and are not served: the values that ask for nothing are let through."""


class ApiError(Exception):
    """An error in OpenAI's shape: status code, message, the parameter at fault, extra headers."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Common(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    temperature: float | None = Field(None, ge=0, le=100, description="OpenAI's default is 1")
    seed: int | None = Field(None, ge=-2**63, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None

    def refuse_unsupported(self) -> None:
        """Raise ApiError 400 for the first parameter that asks for what is not served."""
        for name, harmless in UNSUPPORTED.items():
            value = (self.model_extra or {}).get(name)
            if value not in harmless:
                raise ApiError(400, f"{name}={value!r} is not supported here: leave it out", name, "unsupported_parameter")

    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        if len(stops) > 4 or any(not stop for stop in stops):
            raise ApiError(400, "stop: at most 4 strings, none of them empty", "stop")
        return tuple(stops)

    def generation(self, max_tokens: int | None, limit: int, default: int) -> Generation:
        """Settings of one answer. Raises ApiError 400 for limits out of range."""
        wanted = default if max_tokens is None else max_tokens
        if not 1 <= wanted <= limit:
            raise ApiError(400, f"max_tokens: must lie between 1 and {limit}, got {wanted}", "max_tokens")
        temperature = 1.0 if self.temperature is None else self.temperature
        if not math.isfinite(temperature):
            raise ApiError(400, "temperature: must be a number", "temperature")
        seed = uuid.uuid4().int >> 65 if self.seed is None else self.seed
        return Generation(f"req-{uuid.uuid4().hex}", max_new_tokens=wanted, temperature=temperature, seed=seed,
                          stop=self.stops())

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))


class CompletionRequest(_Common):
    """POST /v1/completions: raw text or token ids, no chat template."""

    prompt: str | list[int]
    max_tokens: int | None = None


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    def plain_messages(self) -> list[dict[str, str]]:
        """Messages with text content; content parts of type text are joined. Raises ApiError 400 for others."""
        plain = []
        for index, message in enumerate(self.messages):
            content = message.get("content")
            if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                content = "".join(str(part.get("text", "")) for part in content)
            if not isinstance(content, str) or not isinstance(message.get("role"), str):
                raise ApiError(400, f"messages[{index}]: needs a role and text content", "messages")
            plain.append({"role": message["role"], "content": content})
        return plain


def finish_reason(answer: Answer) -> str:
    """OpenAI knows `stop` and `length`; running into the context limit is a `length`."""
    return "stop" if answer.finish_reason == "stop" else "length"


def usage(answer: Answer) -> dict[str, Any]:
    """Token counts, and what speculation did for this answer."""
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": len(answer.token_ids),
            "total_tokens": answer.prompt_tokens + len(answer.token_ids),
            "speculative": {"steps": answer.steps, "drafted": answer.drafted, "accepted": answer.accepted,
                            "tokens_per_step": round(answer.tokens_per_step, 4)}}


def response(kind: str, model: str, answer: Answer) -> dict[str, Any]:
    """A whole answer; `kind` is `chat.completion` or `text_completion`."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason(answer), "logprobs": None}
    if kind == "chat.completion":
        choice["message"] = {"role": "assistant", "content": answer.text}
    else:
        choice["text"] = answer.text
    return {"id": answer.id, "object": kind, "created": int(time.time()), "model": model, "choices": [choice],
            "usage": usage(answer)}


def chunk(kind: str, model: str, request_id: str, created: int, delta: str | None, answer: Answer | None = None,
          first: bool = False) -> str:
    """One server-sent event of a stream."""
    reason = finish_reason(answer) if answer is not None else None
    if kind == "chat.completion":
        content = ({"role": "assistant"} if first else {}) | ({"content": delta} if delta is not None else {})
        choice: dict[str, Any] = {"index": 0, "delta": content, "finish_reason": reason}
        kind = "chat.completion.chunk"
    else:
        choice = {"index": 0, "text": delta or "", "finish_reason": reason}
    return event({"id": request_id, "object": kind, "created": created, "model": model, "choices": [choice]})


def usage_chunk(kind: str, model: str, request_id: str, created: int, answer: Answer) -> str:
    """The last event of a stream that asked for usage: no choices, only counts."""
    kind = "chat.completion.chunk" if kind == "chat.completion" else kind
    return event({"id": request_id, "object": kind, "created": created, "model": model, "choices": [],
                  "usage": usage(answer)})


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
