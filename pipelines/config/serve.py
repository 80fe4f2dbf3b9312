"""The settings of `serve`."""

from __future__ import annotations

import os
import re
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from hydra_core.storage import check_scheme, scheme_of
from pipelines.config.base import Workers
from pipelines.config.section import Section

PLAIN = "plain"
"""What `serve.model` says for decoding without a drafter."""
ALIAS = re.compile(r"models:/[^/@]+@[^/@]+$")
"""A `serve.model` that may mean other heads tomorrow."""
FOLLOW_SECONDS = 30.0
HOOK = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class RecordSection(Section):
    """What the endpoint keeps of its answers, to train on: token ids and acceptance, never keys or headers."""

    share: float = Field(0.0, ge=0, le=1, description="share of requests whose answers are recorded, by their ids; 0: none")
    folder: str | None = Field(
        None, description="where the records go (a path or a URI); default: STORAGE/served/APP_NAME (serve.app_name)")
    max_bytes: int = Field(2**30, ge=1, description="size of that folder; the oldest records go first")
    max_age_days: float = Field(30.0, gt=0, description="age after which a record is removed")
    rows_per_file: int = Field(256, ge=1, description="records in a part file")
    seconds: float = Field(60.0, gt=0, description="after which records are written, however few: what a killed replica loses")
    redact: str | None = Field(
        None, pattern=HOOK, description="module:function that gets each record (a dict) and returns what may be kept, or None: "
                                        "nothing; its module has to be installed where replicas run. A record whose tokens it "
                                        "changes is not learned from")

    @field_validator("folder")
    @classmethod
    def _folder_is_absolute(cls, value: str | None) -> str | None:
        if value is not None and scheme_of(value) is None and not os.path.isabs(value):
            raise ValueError(f"must be an absolute path or a URI, got {value!r}: replicas run in an unpacked copy")
        return value if value is None else check_scheme(value)


class ServeSection(Section):
    """The OpenAI-compatible endpoint."""

    renamed: ClassVar[dict[str, str]] = {"max_batch": "max_batch_size"}

    model: str | None = Field(
        None, description="models:/NAME@alias, a folder (a path or a URI), `bundled` or `plain`; default: champion, else the "
                          "bundled heads")
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
    follow_registry: float | None = Field(
        None, ge=0, description="seconds between two looks at whether the alias in `model` (or the champion) names another "
                                f"version, which then decodes; 0: never; default: {FOLLOW_SECONDS:g} where `model` is an alias")
    webhook_secret_file: str | None = Field(
        None, description="file with the secret of MLflow's webhook for model_version_alias.created, which is taken at "
                          "/registry/webhook and lets the endpoint look at once")
    shared_answers: int = Field(
        0, ge=0, description="tokens of finished answers that each replica keeps in memory and drafts from for all requests, "
                             "where trees are dynamic (n-gram, combined): no answer changes, but how fast one comes then tells "
                             "what others were answered; 0: none")
    prefix_cache_tokens: int = Field(
        8192, ge=0, description="tokens of finished requests whose keys and values each replica keeps, so that a later turn or "
                                  "a common instruction is not computed again; how soon an answer begins then tells whether "
                                  "somebody asked a prompt that begins alike; 0: none")
    record: RecordSection = RecordSection()
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

    @model_validator(mode="after")
    def _follows_an_alias(self) -> ServeSection:
        asked = self.webhook_secret_file is not None or bool(self.follow_registry)
        if asked and self.model is not None and ALIAS.match(self.model) is None:
            name = "webhook_secret_file" if self.webhook_secret_file is not None else "follow_registry"
            raise ValueError(f"serve.{name}: serve.model={self.model} never names other heads: write models:/NAME@ALIAS")
        return self

    @property
    def follow_seconds(self) -> float:
        """Seconds between two looks at the registry, 0: none.

        An alias that somebody has written down asks for what it names, whenever. Without `model` the endpoint needs no registry:
        it may be a laptop with the bundled heads, and MLflow's client takes a process of its own.
        """
        if self.follow_registry is not None:
            return self.follow_registry
        return FOLLOW_SECONDS if self.model is not None and ALIAS.match(self.model) else 0.0

    @property
    def follows(self) -> bool:
        """Whether other heads that the registry names are taken while the endpoint runs."""
        return self.follow_seconds > 0 or self.webhook_secret_file is not None
