"""A request: prompt, sampling settings and limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hydra_core.errors import InputError

MOST_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-4
"""Below it a draw is greedy except for rounding errors; 0 is exactly greedy."""


@dataclass(frozen=True)
class Typical:
    """Typical acceptance (Medusa, arXiv 2401.10774): LOSSY, answers differ from plain decoding.

    A drafted token is accepted when its probability exceeds min(threshold, alpha * exp(-entropy)).
    """

    threshold: float = 0.09
    alpha: float = 0.3


@dataclass(frozen=True)
class Request:
    """One sequence to decode.

    `temperature` 0 is greedy; above 0, tokens are drawn with noise that depends only on seed, choice and position.
    Logits are processed in the order: repetition, presence and frequency penalty, temperature, top-k, top-p, min-p. The
    repetition penalty counts prompt and answer, the other two only the answer. `stop_ids` replaces the base's own
    end-of-turn ids when given; `stop` strings end an answer with the token that completes one (the base needs a tokenizer).
    The stop token is the last one of the result. `logprobs`: how many of the most likely tokens are reported at each
    position, with the chosen one, from the base's unprocessed logits; None reports nothing. `speculate`: whether tokens
    are drafted; without drafts the answer is the same, one token per step. `hidden_states`: whether the result holds the
    base's hidden states of prompt and answer, for which the sequence stays in the batch for one more step.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    choice: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    lossy_typical: Typical | None = None
    speculate: bool = True
    hidden_states: bool = False

    def __post_init__(self) -> None:
        """Convert lists to tuples; `check` refuses other types."""
        for name in ("prompt_ids", "stop_ids", "stop"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    @property
    def penalised(self) -> bool:
        """Whether penalties make the choice of a token depend on the tokens before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def truncated(self) -> bool:
        """Whether improbable tokens are cut off before a draw."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def check(self, vocab_size: int, context_limit: int, *, texts: bool = True) -> None:
        """Raise InputError that names the field when the request cannot be decoded; `texts`: there is a tokenizer."""
        self._check_types()
        if not self.prompt_ids:
            raise self._wrong("prompt", "is empty")
        if min(self.prompt_ids) < 0 or max(self.prompt_ids) >= vocab_size:
            raise self._wrong("prompt_ids", f"a token id lies outside the vocabulary of {vocab_size}")
        if len(self.prompt_ids) >= context_limit:
            raise self._wrong("prompt", f"{len(self.prompt_ids)} tokens leave no room in a context of "
                                        f"{context_limit}: shorten it")
        if self.max_new_tokens < 1:
            raise self._wrong("max_new_tokens", f"must be at least 1, got {self.max_new_tokens}")
        if not -2**63 <= self.seed < 2**63:
            raise self._wrong("seed", "must fit 64 bits")
        self._check_sampling()
        self._check_stops(vocab_size, texts)

    def _check_types(self) -> None:
        for name in ("max_new_tokens", "seed", "choice", "top_k", *(() if self.logprobs is None else ("logprobs",))):
            if type(value := getattr(self, name)) is not int:
                raise self._wrong(name, f"must be a whole number, got {value!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            if type(value := getattr(self, name)) not in (int, float):
                raise self._wrong(name, f"must be a number, got {value!r}")
        for name, kind in (("prompt_ids", int), ("stop", str), *(() if self.stop_ids is None else (("stop_ids", int),))):
            value = getattr(self, name)
            if type(value) is not tuple or any(type(item) is not kind for item in value):
                raise self._wrong(name, f"must be a list of {'token ids' if kind is int else 'strings'}, got {value!r:.60}")

    def _check_sampling(self) -> None:
        for name, value, low, high in (
                ("temperature", self.temperature, 0, math.inf), ("top_k", self.top_k, 0, math.inf),
                ("top_p", self.top_p, 0, 1), ("min_p", self.min_p, 0, 1),
                ("repetition_penalty", self.repetition_penalty, 0, math.inf),
                ("presence_penalty", self.presence_penalty, -math.inf, math.inf),
                ("frequency_penalty", self.frequency_penalty, -math.inf, math.inf),
                ("choice", self.choice, 0, 2**31), ("logprobs", self.logprobs or 0, 0, MOST_LOGPROBS)):
            if not math.isfinite(value) or not low <= value <= high:
                limits = f"between {low} and {high}" if math.isfinite(high) else f"{low} or more"
                raise self._wrong(name, f"must be {limits}, got {value}" if math.isfinite(low) else f"got {value}")
        for name, value in (("top_p", self.top_p), ("repetition_penalty", self.repetition_penalty)):
            if value == 0:
                raise self._wrong(name, "must be more than 0")
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise self._wrong("temperature", f"must be 0 (greedy) or at least {LEAST_TEMPERATURE:g}, got {self.temperature}")
        typical = self.lossy_typical
        if typical is not None and not (0 < typical.threshold <= 1 and typical.alpha > 0):
            raise self._wrong("lossy_typical", "threshold must lie in (0, 1] and alpha be more than 0")

    def _check_stops(self, vocab_size: int, texts: bool) -> None:
        if any(not stop for stop in self.stop):
            raise self._wrong("stop", "must be strings that are not empty")
        if self.stop and not texts:
            raise self._wrong("stop", "the base has no tokenizer: use stop_ids")
        if any(not 0 <= token < vocab_size for token in self.stop_ids or ()):
            raise self._wrong("stop_ids", f"must be token ids below {vocab_size}")

    def _wrong(self, field: str, what: str) -> InputError:
        return InputError(f"request {self.id}: {field}: {what}")


def choices(request: Request, count: int) -> list[Request]:
    """`count` requests for as many answers to one prompt: equal but for the noise and the ids (`id/0`, `id/1`, ...)."""
    return [replace(request, id=f"{request.id}/{choice}", choice=choice) for choice in range(count)]


@dataclass(frozen=True)
class TokenLogprob:
    """Log probability of the chosen `token`, and of the most likely ones as (token, log probability), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
