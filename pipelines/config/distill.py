"""The settings of `distill`."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.base import Workers
from pipelines.config.section import Section


class PromptsSection(Section):
    """Where the prompts come from."""

    source: Literal["self", "jsonl", "parquet", "datasets", "served"] = Field(
        "self", description="self: the base writes user turns itself (Magpie); datasets: hub id or local folder; served: what "
                            "an endpoint has recorded (serve.record), with its answers")
    path: str | None = Field(None, description="file or folder (a path or a URI), or hub id; not used by source=self; "
                                        "source=served: default serve.record.folder")
    field: str = Field("prompt", description="column that holds the prompt text (or `messages`, a chat)")
    split: str = Field("train", description="split of a data set (source=datasets)")
    count: int | None = Field(None, ge=1, description="number of prompts to write (source=self) or to read from the file; of "
                                                      "records (source=served): the latest ones")
    drop_patterns: tuple[str, ...] = Field((), description="regular expressions; a record whose prompt or answer has one of them "
                                                           "is left out (source=served): personal data, for example")
    self_made: int = Field(0, ge=0, description="number of prompts that the base writes in addition to those of a file")
    starts: tuple[str, ...] = Field(
        ("",), min_length=1, description="what self-made prompts begin with, in turn: `Translate German to English:`, ...")
    max_tokens: int = Field(128, ge=4, description="length limit of a self-made prompt, in tokens, without its start")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of self-made prompts")
    seed: int = Field(0, description="of self-made prompts")

    @field_validator("drop_patterns")
    @classmethod
    def _are_expressions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _path_matches_source(self) -> PromptsSection:
        if self.source not in ("self", "served") and not self.path:
            raise ValueError(f"prompts.path is needed with prompts.source={self.source}")
        if self.source == "self" and self.path:
            raise ValueError("prompts.path has no effect with prompts.source=self: set prompts.source too")
        if self.source == "served" and self.self_made:
            raise ValueError("prompts.self_made is for prompts besides a file's: distill those in a run of their own, and name "
                             "that in train.also")
        if self.drop_patterns and self.source != "served":
            raise ValueError(f"prompts.drop_patterns has no effect with prompts.source={self.source}")
        if self.source == "self" and self.self_made:
            raise ValueError("prompts.self_made is for prompts besides a file's: with prompts.source=self set prompts.count")
        return self


class DistillSection(Section):
    """The base's own answers to prompts, and its hidden states."""

    renamed: ClassVar[dict[str, str]] = {"running_batch": "max_batch_size"}

    temperatures: tuple[float, ...] = Field((0.0, 1.0), min_length=1, description="one answer per prompt for each")
    max_new_tokens: int = Field(128, ge=1, description="length limit of an answer, in tokens")
    seed: int = Field(0, description="of sampled answers (temperature above 0)")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of prompts kept for validation; their ids decide which")
    workers: Workers = Workers()
    max_workers: int | None = Field(None, ge=1, description="most workers, started as there is work; default: workers.count")
    max_batch_size: int = Field(32, ge=1, description="sequences that one worker decodes together")
    heads: str | None = Field(
        None, description="heads or configuration folder (a path or a URI), or `bundled`, to decode with: the same rows in "
                          "less time")
    rows_per_file: int = Field(64, ge=1, description="rows in a part file: the most work that a killed run loses")
    features: Literal["all", "held_out"] = Field(
        "all", description="rows whose hidden states are stored; held_out: enough for train.features=online")
    check_share: float = Field(0.02, ge=0, le=1, description="share of rows whose hidden states, as decoding gave them, are "
                                                             "compared with those of a forward over the whole row")
    feature_dtype: Literal["bf16", "fp32"] = Field("bf16", description="number format of stored hidden states")
    max_error_share: float = Field(0.05, ge=0, le=1, description="the stage fails if a larger share of prompts fails")

    @model_validator(mode="after")
    def _most_is_no_fewer(self) -> DistillSection:
        if self.max_workers is not None and self.max_workers < self.workers.count:
            raise ValueError(f"distill.max_workers={self.max_workers} is fewer than distill.workers.count={self.workers.count}")
        return self
