"""OpenAI's requests, as far as they are supported; every other parameter is refused by name."""

from __future__ import annotations

import math
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hydra_core.sampling.request import LEAST_TEMPERATURE, MOST_LOGPROBS
from pipelines.rows.conversations import BadChat, normal_chat
from pipelines.serve.messages import Generation, Speculative
from pipelines.serve.openai.errors import ApiError

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1), "logit_bias": (None, {}), "echo": (None, False), "suffix": (None, ""), "tools": (None, []),
    "tool_choice": (None, "none", "auto"), "functions": (None, []), "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]), "audio": (None,),
    "parallel_tool_calls": (None, True, False), "store": (None, False), "min_tokens": (0,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "include_stop_str_in_output": (False,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "use_beam_search": (False,), "length_penalty": (1.0, 1), "bad_words": ([],),
    "chat_template_kwargs": ({},),
}
"""Parameters that are not supported, each with the values that have no effect and are accepted."""
IGNORED = ("user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier")
"""Parameters that are accepted and change no answer."""
MOST_STOPS, LONGEST_STOP, MOST_STOP_IDS = 4, 256, 64


class StreamOptions(BaseModel):
    """What a stream contains besides the text."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class _Common(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    n: int | None = Field(None, ge=1, description="answers to make, which differ by their noise")
    temperature: float | None = Field(None, ge=0, le=100, description="OpenAI's default is 1; 0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1, description="0: greedy")
    top_k: int | None = Field(None, ge=-1, le=2**31, description="0 and -1: all")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="1: none")
    stop_token_ids: list[int] | None = Field(None, max_length=MOST_STOP_IDS)
    ignore_eos: bool | None = Field(None, description="go on after the end of a turn")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-2**63, lt=2**63, description="the same seed gives the same text, whatever else runs")
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    speculative: Speculative | None = Field(
        None, description="drafter (default): exact drafts; off: plain decoding, the same text; lossy-typical: typical "
                          "acceptance, which changes the text")

    def refuse_unsupported(self) -> None:
        """Raise ApiError 400 for the first parameter that is unknown or not supported."""
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or value is None:
                continue
            if name not in UNSUPPORTED:
                raise ApiError(400, f"{name!r}: unknown parameter: leave it out", name, "unknown_parameter")
            if not any(type(value) is type(harmless) and value == harmless for harmless in UNSUPPORTED[name]):
                raise ApiError(400, f"{name}={str(value)[:60]!r} is not supported here: leave it out", name,
                               "unsupported_parameter")

    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        if len(stops) > MOST_STOPS or any(not stop for stop in stops):
            raise ApiError(400, f"stop: at most {MOST_STOPS} strings, none of them empty", "stop")
        if any(len(stop) > LONGEST_STOP for stop in stops):
            raise ApiError(400, f"stop: at most {LONGEST_STOP} characters a string", "stop")
        return tuple(stops)

    def generation(self, prefix: str, limit: int, default: int, most: int) -> Generation:
        """The request to a replica. `limit`: maximum tokens of an answer; `most`: maximum answers. Raises ApiError 400."""
        name, wanted = self._wanted()
        wanted = min(default, limit) if wanted is None else wanted
        if not 1 <= wanted <= limit:
            raise ApiError(400, f"{name}: must lie between 1 and {limit}, got {str(wanted)[:40]}", name)
        n = 1 if self.n is None else self.n
        if n > most:
            raise ApiError(400, f"n: at most {most} answers to one request, got {str(n)[:40]}", "n")
        temperature = 1.0 if self.temperature is None else self.temperature
        if not math.isfinite(temperature) or 0 < temperature < LEAST_TEMPERATURE:
            raise ApiError(400, f"temperature: must be 0 or at least {LEAST_TEMPERATURE:g}", "temperature")
        if self.top_p == 0:
            temperature = 0.0  # nothing but the likeliest token is left
        seed = uuid.uuid4().int >> 65 if self.seed is None else self.seed
        return Generation(f"{prefix}-{uuid.uuid4().hex}", max_new_tokens=wanted, temperature=temperature, seed=seed,
                          stop=self.stops(), n=n, top_p=self.top_p or 1.0, top_k=max(0, self.top_k or 0), min_p=self.min_p or 0.0,
                          repetition_penalty=self.repetition_penalty or 1.0, stop_ids=tuple(self.stop_token_ids or ()),
                          ignore_eos=bool(self.ignore_eos),
                          presence_penalty=self.presence_penalty or 0.0, frequency_penalty=self.frequency_penalty or 0.0,
                          logprobs=self.wanted_logprobs(), speculative=self.speculative or "drafter")

    def _wanted(self) -> tuple[str, int | None]:
        """Name and value of the field that limits the answer."""
        return "max_tokens", self.max_tokens

    def wanted_logprobs(self) -> int | None:
        """The top_k of log probabilities at each position; None: no log probabilities."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(_Common):
    """POST /v1/completions: raw text or token ids, without a chat template."""

    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        """The prompt itself where a list holds one."""
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
            value = value[0]
        if isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value)):
            return value
        raise ValueError("one prompt a request: a text, or a list of token ids")

    def wanted_logprobs(self) -> int | None:
        return self.logprobs


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def _wanted(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super()._wanted()

    def wanted_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs=true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def plain_messages(self) -> list[dict[str, Any]]:
        """Messages in the normal form of `rows.conversations`. Raises ApiError 400 that names the message and the key."""
        try:
            return normal_chat(self.messages, strict=True)
        except BadChat as error:
            raise ApiError(400, f"messages{'' if str(error).startswith('[') else ': '}{error}", "messages") from None
