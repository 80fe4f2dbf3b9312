"""What crosses between ingress, replicas and batch jobs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


def is_text(value: Any) -> bool:
    """Whether strings in JSON-able `value` can be written as UTF-8: JSON can spell half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Generation:
    """One answer to be made. Exactly one of `prompt` (templated), `text` (raw), `messages` and `prompt_ids` is given."""

    id: str
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    prompt: str | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_ids: list[int] | None = None


@dataclass(frozen=True)
class Answer:
    """A finished answer. `latency_seconds`: from arrival at the replica to the last token; `drafted`: None when a stop
    string ended the answer before the engine did."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    steps: int
    drafted: int | None
    accepted: int
    latency_seconds: float

    @property
    def tokens_per_step(self) -> float:
        """As `Result.tokens_per_step`."""
        return (len(self.token_ids) - 1) / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Refusal:
    """Why there is no answer. `status`: 400 for a bad request, 429 for a full queue."""

    status: int
    message: str


@dataclass(frozen=True)
class AppArgs:
    """A resolved, validated application; `configuration` None decodes plainly. Plain values: Serve ships them as JSON."""

    base: dict[str, Any]
    cache: str
    configuration: str | None
    label: str
    app_name: str = "hydra-heads"
    max_batch: int = 8
    max_queued: int = 256
    max_new_tokens: int = 1024
    replicas: int = 1
    cpus: float = 0.5
    gpus: float = 0.0
    threads: int = 2
