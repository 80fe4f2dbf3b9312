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
        None, description="models:/NAME@alias, a folder, `bundled` or `plain`; default: champion, else the package's own heads")
    app_name: str = "hydra-heads"
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    replicas: int = Field(1, ge=1, description="at least so many")
    max_replicas: int | None = Field(None, ge=1, description="at most so many, as answers in flight ask for; default: replicas")
    max_batch_size: int = Field(8, ge=1, description="rows one replica decodes together")
    max_queued: int = Field(256, ge=0, description="answers waiting for a row of a replica before 429")
    max_new_tokens: int = Field(1024, ge=1, description="most a request may ask for")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt; default: what the context leaves room for")
    max_body_bytes: int = Field(2**20, ge=1, description="longest request")
    drain_seconds: float = Field(120.0, ge=0, description="a replica that is to go has to finish what it has begun")
    api_keys_file: str | None = Field(
        None, description="keys that open the endpoint, one a line, with those in HYDRA_HEADS_API_KEYS; without any, all may ask")
    update: bool = Field(False, description="give the running application `model` to decode with, and end")
    workers: Workers = Workers(cpus=0.5, threads=2)

    @model_validator(mode="after")
    def _most_replicas(self) -> ServeSection:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"serve.max_replicas={self.max_replicas} is fewer than serve.replicas={self.replicas}")
        return self
