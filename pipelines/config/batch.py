"""The settings of `batch`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.config.section import Section


class BatchSection(Section):
    """Offline generation through the Serve deployment."""

    input: str | None = Field(None, description="JSONL, Parquet or OpenAI Batch file; default: held-out prompts of this run")
    output: str | None = Field(None, description="folder; default: inside the run")
    partition: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$",
        description="stands for {partition} in input and output, as 2026-01-31; `today`, `yesterday`: those days in UTC")
    format: Literal["auto", "jsonl", "parquet", "openai"] = Field("auto", description="of the output; auto: the input's")
    engine: Literal["serve", "embedded"] = Field(
        "serve", description="embedded: serve.replicas actors of serve.workers, each with an engine of its own")
    address: str | None = Field(None, pattern=r"^https?://", description="endpoint to ask over HTTP instead")
    key_variable: str | None = Field(None, description="environment variable that holds the API key of `address`")
    field: str = "prompt"
    limit: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    seed: int = 0
    concurrency: int | None = Field(None, ge=1, description="requests in flight; default: twice the rows that replicas decode")
    rows_per_file: int = Field(64, ge=1)
    max_error_share: float = Field(0.05, ge=0, le=1)

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
            raise ValueError("batch.output needs {partition} in it: each partition has a folder of its own")
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
