"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any

from pipelines.serve.messages import Refusal

KINDS = {401: "authentication_error", 429: "rate_limit_error"}
RETRY_SECONDS, CLOSING_SECONDS = 1, 5
"""Seconds after which a client may ask again: while a replica is replaced, and while the whole endpoint is."""


class ApiError(Exception):
    """An error in OpenAI's format: status code, message, the parameter at fault, extra headers."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": printable(self.message), "type": kind,
                          "param": None if self.param is None else printable(self.param), "code": self.code}}


def printable(text: str) -> str:
    """`text` as valid UTF-8, cut to 500 characters."""
    whole = text.encode("utf-8", "replace").decode()
    return whole if len(whole) <= 500 else whole[:497] + "..."


def queue_full(in_flight: int, seconds: int = RETRY_SECONDS) -> ApiError:
    """`seconds`: until there may be room."""
    return ApiError(429, f"{in_flight} answers are being made already: try again later", code="queue_full",
                    headers={"Retry-After": str(seconds)})


def not_ready(why: str) -> ApiError:
    return ApiError(503, f"{why}: try again later", code="not_ready", headers={"Retry-After": str(RETRY_SECONDS)})


def closing() -> ApiError:
    return ApiError(503, "this endpoint is being stopped and finishes what it has accepted: ask another one, or later",
                    code="closing", headers={"Retry-After": str(CLOSING_SECONDS)})


def too_slow(seconds: float | None) -> ApiError:
    return ApiError(504, f"the answer was not complete within the {seconds or 0:g} seconds that a request may take: ask for "
                         "fewer tokens, or try again when there is less to do", code="timeout")


TOO_LONG = ("tokens leave no room in a context of", "tokens are more than the", "characters are more than the")


def refused(refusal: Refusal, seconds: int = RETRY_SECONDS) -> ApiError:
    """The error that a client gets for a replica's refusal. `seconds`: until a full queue may have room."""
    if refusal.status == 503:
        return ApiError(503, refusal.message, code="not_ready", headers={"Retry-After": str(RETRY_SECONDS)})
    if refusal.status == 429:
        return ApiError(429, refusal.message, code="queue_full", headers={"Retry-After": str(seconds)})
    if refusal.status == 504:
        return ApiError(504, refusal.message, code="timeout")
    code = "context_length_exceeded" if any(words in refusal.message for words in TOO_LONG) else None
    return ApiError(refusal.status, refusal.message, refusal.message.split(":")[0] or None, code)
