"""The settings of `load`."""

from __future__ import annotations

from pydantic import Field, PositiveFloat

from pipelines.config.section import Section


class LoadSection(Section):
    """Requests at a constant rate, whether or not earlier ones are answered."""

    address: str | None = Field(
        None, pattern=r"^https?://", description="endpoint to send to; default: an application started for it")
    key_variable: str | None = Field(None, description="environment variable that holds the API key of `address`")
    prompts: str | None = Field(None, description="JSONL of `prompt`; default: held-out prompts of this run")
    limit: int = Field(64, ge=1, description="number of prompts, which are sent again and again")
    max_new_tokens: int = Field(64, ge=1, description="length limit of an answer, in tokens")
    rates: tuple[PositiveFloat, ...] = Field((0.5, 0.75, 1.0, 1.5, 2.0), min_length=1, description="multiples of the capacity")
    seconds: float = Field(30.0, gt=0, description="how long requests are sent at each rate")
    capacity_requests: int = Field(32, ge=1, description="requests that measure the capacity, with a full batch in flight")
    first_token_seconds: float = Field(5.0, gt=0, description="goodput counts answers whose first token comes within this time")
    patience: float = Field(300.0, gt=0, description="seconds after which a request counts as lost")
    soak: bool = Field(False, description="instead: kill replicas, swap heads, leave, burst and stay silent for some minutes, "
                                          "and check that nothing is lost")
    soak_minutes: float = Field(20.0, gt=0, description="how long a soak lasts")
    soak_seed: int | None = Field(None, description="what happens when in a soak; default: drawn, and told")
    soak_growth: float = Field(2.0, gt=0, description="MiB a minute by which a process may grow during a soak")
