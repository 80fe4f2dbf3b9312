"""The messages between ingress, replicas and batch jobs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

Speculative = Literal["off", "drafter", "lossy-typical"]
"""How an answer is decoded: without drafts, with exact drafts, or by typical acceptance, which changes answers."""


def is_text(value: Any) -> bool:
    """Whether all strings in the JSON-like `value` can be written as UTF-8: JSON can express half a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Generation:
    """A request to a replica. Exactly one of `prompt` (templated), `text` (raw), `messages` and `prompt_ids` is given.

    `n`: answers to the prompt, which differ by their sampling noise; `logprobs`: the number of most likely tokens that are
    returned at each position besides the sampled one, None: no log probabilities. `arrived`: Unix time at which the front got
    the request, None: when the replica gets it; waiting in between counts. `seconds`: in which the whole answer must be made,
    from `arrived` on; after that its sequences are cancelled and it ends with Refusal 504. None: no limit. `stop_ids`:
    token ids that end an answer besides the base's own, which `ignore_eos` turns off.
    """

    id: str
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    prompt: str | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt_ids: list[int] | None = None
    n: int = 1
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    speculative: Speculative = "drafter"
    arrived: float | None = None
    seconds: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Token:
    """A token with its log probability and UTF-8 bytes, and the most likely ones at its position, best first, which have none of
    their own. A token that ends an answer has a name and no bytes: the bytes of all tokens together are the answer's text."""

    text: str
    logprob: float
    bytes: bytes
    top: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that one step added to choice `index`. `depths`: for each of its tokens, 1, 2, ... for accepted drafts and 0
    for the base's own token; `tokens`: where log probabilities were requested."""

    index: int
    text: str
    depths: tuple[int, ...]
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A finished answer: choice `index`. `latency_seconds`: from arrival at the replica to the last token; `drafted`,
    `accepted`, `accepted_lengths` and `cached_tokens` as in `Result`; `tokens`: where log probabilities were requested;
    `system_fingerprint`: of the model that made it, as `ModelDigest.fingerprint`."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    steps: int
    drafted: int | None
    accepted: int
    latency_seconds: float
    index: int = 0
    accepted_lengths: tuple[int, ...] = ()
    tokens: tuple[Token, ...] | None = None
    system_fingerprint: str | None = None
    cached_tokens: int = 0

    @property
    def tokens_per_step(self) -> float:
        """As `Result.tokens_per_step`."""
        return (len(self.token_ids) - 1) / self.steps if self.steps else 0.0


@dataclass(frozen=True)
class Refusal:
    """Why there is no answer. `status`: 400 for a bad request, 429 for a full queue, 503 for a failed engine, 504 when the
    time of the request is over. `in_flight`: the engine failed while it made this answer, so the request itself may be the
    reason: it should not be asked again more than a few times. `replica`: which one refuses."""

    status: int
    message: str
    in_flight: bool = False
    replica: str | None = None


@dataclass(frozen=True)
class AppArgs:
    """A resolved, validated application. `configuration` None: plain decoding. Plain values, since Serve sends them as JSON.

    `version`: of a registered model; `digest`: of the configuration's files, checked again where they are loaded;
    `max_replicas`: None keeps `replicas`; `api_key_digests`: sha256 in hex of the valid keys, none: no key is needed;
    `max_body_bytes`: of one request; `drain_seconds`: the time in which an application that is stopped may finish its answers;
    `hung_seconds`: the time that one step may take before the replica counts as hung; `request_seconds`: from a request's
    arrival to the end of its answer, None: no limit; `require_keys`: never run without a key; `cors_origins`: origins of web
    pages that may ask, `*`: all; `owner`: Ray's id of the driver with which the application ends, None: it stays until somebody
    deletes it; `follow`: the fields of `follower.Follow`, None: no registry is followed; `webhook_secret`: with which MLflow
    signs its webhooks, None: none are taken; `record`: the fields of `recorder.Recording`, None: no answer is recorded;
    `shared_answers`: tokens of finished answers that each replica keeps and drafts from for everybody, 0: none;
    `prefix_cache_tokens`: as `prefix_cache` of `Engine`; `vllm`: the fields of `interop.VllmSettings`, with which vLLM decodes,
    None: our own engine does.
    """

    base: dict[str, Any]
    cache: str
    configuration: str | None
    label: str
    app_name: str = "hydra-heads"
    max_batch_size: int = 8
    max_queued: int = 256
    max_new_tokens: int = 1024
    replicas: int = 1
    cpus: float = 0.5
    gpus: float = 0.0
    threads: int = 2
    version: int | None = None
    digest: str | None = None
    max_replicas: int | None = None
    max_prompt_tokens: int | None = None
    max_body_bytes: int = 2**20
    api_key_digests: tuple[str, ...] = ()
    drain_seconds: float = 120.0
    hung_seconds: float = 120.0
    request_seconds: float | None = None
    require_keys: bool = False
    cors_origins: tuple[str, ...] = ()
    owner: str | None = None
    follow: dict[str, Any] | None = field(default=None, repr=False)
    webhook_secret: str | None = field(default=None, repr=False)
    record: dict[str, Any] | None = None
    shared_answers: int = 0
    prefix_cache_tokens: int = 0
    vllm: dict[str, Any] | None = None

    @property
    def room(self) -> int:
        """Answers that one replica accepts at once: those that decode and those that wait for a slot."""
        return self.max_batch_size + self.max_queued
