"""What goes into the engine and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hydra_core.errors import InputError

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One sequence to decode.

    `temperature` 0 is greedy; above it tokens are drawn by noise that depends on `seed` and position alone. `stop_ids`
    replaces the base's own end-of-turn ids when given. The stop token is the last one of the result.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None

    def check(self, vocab_size: int, context_limit: int) -> None:
        """Raise InputError that names the field when the request cannot be decoded."""
        if not self.prompt_ids:
            raise InputError(f"request {self.id}: prompt: is empty")
        if min(self.prompt_ids) < 0 or max(self.prompt_ids) >= vocab_size:
            raise InputError(f"request {self.id}: prompt_ids: a token id lies outside the vocabulary of {vocab_size}")
        if len(self.prompt_ids) >= context_limit:
            raise InputError(f"request {self.id}: prompt: {len(self.prompt_ids)} tokens leave no room in a context of "
                             f"{context_limit}: shorten it")
        if self.max_new_tokens < 1:
            raise InputError(f"request {self.id}: max_new_tokens: must be at least 1, got {self.max_new_tokens}")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise InputError(f"request {self.id}: temperature: must be 0 or more, got {self.temperature}")
        if not -2**63 <= self.seed < 2**63:
            raise InputError(f"request {self.id}: seed: must fit 64 bits")


@dataclass(frozen=True)
class Result:
    """A finished sequence.

    `steps`: base forwards after prefill; `drafted`, `accepted`: draft nodes verified and kept; `prefill_seconds`:
    from admission to the first token; `decode_seconds`: from then on, shared with the rows beside it.
    """

    id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens after the first per base forward after prefill: 1 for plain decoding, 0 when no step was needed."""
        return (len(self.token_ids) - 1) / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class StepOutput:
    """New tokens of one row in one engine step, with the result when the row ended."""

    id: str
    token_ids: tuple[int, ...]
    result: Result | None = None
