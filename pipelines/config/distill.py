"""The settings of `distill`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipelines.config.base import Workers
from pipelines.config.section import Section


class PromptsSection(Section):
    """Where the prompts come from."""

    source: Literal["self", "jsonl", "parquet", "datasets"] = Field(
        "self", description="self: the base writes user turns itself (Magpie); datasets: hub id or local folder")
    path: str | None = Field(None, description="file, folder or hub id; not used by source=self")
    field: str = Field("prompt", description="column that holds the prompt text (or `messages`, a chat)")
    split: str = Field("train", description="split of a data set (source=datasets)")
    count: int | None = Field(None, ge=1, description="number of prompts to write (source=self) or to read from the file")
    self_made: int = Field(0, ge=0, description="number of prompts that the base writes in addition to those of a file")
    starts: tuple[str, ...] = Field(
        ("",), min_length=1, description="what self-made prompts begin with, in turn: `Translate German to English:`, ...")
    max_tokens: int = Field(128, ge=4, description="length limit of a self-made prompt, in tokens, without its start")
    temperature: float = Field(1.0, gt=0, description="sampling temperature of self-made prompts")
    seed: int = Field(0, description="of self-made prompts")

    @model_validator(mode="after")
    def _path_matches_source(self) -> PromptsSection:
        if self.source != "self" and not self.path:
            raise ValueError(f"prompts.path is needed with prompts.source={self.source}")
        if self.source == "self" and self.path:
            raise ValueError("prompts.path has no effect with prompts.source=self: set prompts.source too")
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
    max_batch_size: int = Field(32, ge=1, description="sequences that one worker decodes together")
    heads: str | None = Field(
        None, description="heads or configuration folder, or `bundled`, to decode with: the same rows in less time")
    rows_per_file: int = Field(64, ge=1, description="rows in a part file: the most work that a killed run loses")
    features: Literal["all", "held_out"] = Field(
        "all", description="rows whose hidden states are stored; held_out: enough for train.features=online")
    feature_dtype: Literal["bf16", "fp32"] = Field("bf16", description="number format of stored hidden states")
    max_error_share: float = Field(0.05, ge=0, le=1, description="the stage fails if a larger share of prompts fails")
