"""What the backends of `batch` share: how rows become requests, the response to a row, and the protocol itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from pipelines.batch.reader import BatchRow
from pipelines.batch.retry import ROW_SECONDS, RetryPolicy
from pipelines.serve.messages import AppArgs


@dataclass(frozen=True)
class RequestSettings:
    """How rows become requests, and where they go; plain values. One of `app_name`, `address` and `embedded` is given.

    `model`: the name in a request; `most_choices`: the maximum of `n`, the answers of one row; `row_seconds`: after which an
    attempt at a row counts as hung; `serves`: fingerprint of the model that must make the answers, None: that of the first
    answer to this output, which `made_by` (a file) keeps; `any_model`: of any model then.
    """

    model: str
    max_new_tokens: int
    temperature: float
    seed: int
    most_choices: int = 1
    app_name: str | None = None
    address: str | None = None
    key_variable: str | None = None
    embedded: AppArgs | None = None
    row_seconds: float = ROW_SECONDS
    serves: str | None = None
    made_by: str | None = None
    any_model: bool = False


@dataclass(frozen=True)
class Response:
    """The response to one row. `status` 200: `columns` hold the answer; else `message` says why there is none. `body`: the
    response or error in OpenAI's format, for a row in that format."""

    status: int
    message: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] | None = None


class Backend(Protocol):
    """Answers one row; many threads call it at once.

    `ask` raises StoppedError where the job must end: the backend is gone, or answers with another model. `stop` ends what is
    in flight: a thread that waits for an answer would keep the process alive. `made_by`: what made the answers so far, as text.
    """

    retry_policy: RetryPolicy

    def ask(self, row: BatchRow) -> Response: ...

    def stop(self) -> None: ...

    @property
    def made_by(self) -> str: ...
