"""The settings of `serve`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from pipelines.config.base import Workers
from pipelines.config.section import Section

PLAIN = "plain"
"""What `serve.model` says for decoding without a drafter."""


class ServeSection(Section):
    """The OpenAI-compatible endpoint."""

    renamed: ClassVar[dict[str, str]] = {"max_batch": "max_batch_size"}

    model: str | None = Field(
        None, description="models:/NAME@alias, a folder, `bundled` or `plain`; default: champion, else the bundled heads")
    app_name: str = Field("hydra-heads", description="name of the Serve application, and of the model in requests")
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: open to other machines")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0: any free one")
    replicas: int = Field(1, ge=1, description="least number of replicas")
    max_replicas: int | None = Field(None, ge=1, description="most replicas, started as load needs them; default: replicas")
    max_batch_size: int = Field(8, ge=1, description="sequences that one replica decodes together")
    max_queued: int = Field(256, ge=0, description="answers that may wait for a replica; further requests get 429")
    max_new_tokens: int = Field(1024, ge=1, description="most new tokens that a request may ask for")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt, in tokens; default: what the context allows")
    max_body_bytes: int = Field(2**20, ge=1, description="longest request body, in bytes")
    drain_seconds: float = Field(120.0, ge=0, description="time that a stopping endpoint has to finish the answers it accepted")
    hung_seconds: float = Field(
        120.0, gt=0, description="a step that takes longer, and longer than the longest prompt should, counts as hung: its "
                           "answers fail and the replica is replaced")
    request_seconds: float | None = Field(
        None, gt=0, description="longest time from a request's arrival to the end of its answer, then 504; default: no limit")
    api_keys_file: str | None = Field(
        None, description="file of API keys, one a line, besides those in HYDRA_HEADS_API_KEYS; without any key all may ask")
    require_keys: bool = Field(False, description="do not start without an API key")
    tls_keyfile: str | None = Field(None, description="private key of the certificate, PEM; with tls_certfile: https")
    tls_certfile: str | None = Field(None, description="certificate, with those that signed it, PEM")
    cors_origins: tuple[str, ...] = Field(
        (), description="origins of web pages that may ask, such as https://chat.example; `*`: all")
    update: bool = Field(False, description="make the running application decode with `model`, and end")
    workers: Workers = Workers(cpus=0.5, threads=2)

    @model_validator(mode="after")
    def _count_is_that_of_replicas(self) -> ServeSection:
        if "count" in self.workers.model_fields_set and self.workers.count != 1:
            raise ValueError(f"serve.workers.count={self.workers.count} has no effect: set serve.replicas")
        return self

    @model_validator(mode="after")
    def _both_tls_files(self) -> ServeSection:
        if (self.tls_keyfile is None) != (self.tls_certfile is None):
            given, other = ("keyfile", "certfile") if self.tls_certfile is None else ("certfile", "keyfile")
            raise ValueError(f"serve.tls_{given} needs serve.tls_{other}")
        return self

    @model_validator(mode="after")
    def _most_replicas(self) -> ServeSection:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"serve.max_replicas={self.max_replicas} is fewer than serve.replicas={self.replicas}")
        return self
