"""The settings of `batch`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.section import Section


class BatchSection(Section):
    """Offline generation over a file of prompts."""

    input: str | None = Field(None, description="JSONL, Parquet or OpenAI Batch file, a path or a URI; default: held-out "
                                                "prompts of this run")
    output: str | None = Field(None, description="folder, a path or a URI; default: inside the run")
    partition: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$",
        description="replaces {partition} in input and output, as 2026-01-31; `today`, `yesterday`: those days in UTC")
    format: Literal["auto", "jsonl", "parquet", "openai"] = Field("auto", description="of the output; auto: as the input")
    engine: Literal["serve", "embedded"] = Field(
        "serve", description="serve: the Serve deployment; embedded: serve.replicas actors, each with its own engine")
    address: str | None = Field(
        None, pattern=r"^https?://", description="OpenAI-compatible endpoint to ask over HTTP instead, with or without /v1")
    key_variable: str | None = Field(None, description="environment variable that holds the API key of `address`")
    field: str = Field("prompt", description="column that holds the prompt text (or `messages`, a chat)")
    limit: int | None = Field(None, ge=1, description="number of input rows to answer; default: all")
    max_new_tokens: int = Field(64, ge=1, description="length limit of an answer, in tokens")
    temperature: float = Field(0.0, ge=0, description="sampling temperature; 0: greedy")
    seed: int = Field(0, description="of sampled answers")
    concurrency: int | None = Field(None, ge=1, description="requests in flight; default: twice what replicas decode together")
    rows_per_file: int = Field(64, ge=1, description="rows in an output file: the most work that a killed run loses")
    shared_answers: int = Field(
        0, ge=0, description="tokens of finished answers that each engine of this job's own keeps and drafts from for "
                                 "its other rows, where trees are dynamic (n-gram, combined); 0: none")
    row_seconds: float = Field(600.0, gt=0, description="after which an attempt at a row counts as hung: it is made again, three "
                                                        "in all, and the row is an error then")
    any_model: bool = Field(False, description="take answers of several models from an `address` of another kind; else the job "
                                               "stops when model or system_fingerprint change")
    max_error_share: float = Field(0.05, ge=0, le=1, description="the stage fails if a larger share of rows fails")

    @field_validator("partition", mode="before")
    @classmethod
    def _partition_is_text(cls, value: Any) -> Any:
        days = {"today": 0, "yesterday": 1}
        if value in days:
            return (datetime.now(UTC).date() - timedelta(days[value])).isoformat()
        return value if value is None else str(value)  # YAML reads 2026-01-31 as a date

    @model_validator(mode="after")
    def _fields_fit(self) -> BatchSection:
        for name, value in (("input", self.input), ("output", self.output)):
            if self.partition is None and "{partition}" in (value or ""):
                raise ValueError(f"batch.{name}={value} needs batch.partition")
        if self.partition and self.output and "{partition}" not in self.output:
            raise ValueError("batch.output needs {partition} in it: each partition needs a folder of its own")
        if self.address and self.engine == "embedded":
            raise ValueError("batch.address has no effect with batch.engine=embedded")
        return self

    @property
    def source(self) -> str | None:
        """`input` of this partition."""
        return self.input and self.input.replace("{partition}", self.partition or "")

    @property
    def target(self) -> str | None:
        """`output` of this partition."""
        return self.output and self.output.replace("{partition}", self.partition or "")
