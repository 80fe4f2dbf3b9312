"""The settings of `loop`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from pydantic import Field

from pipelines.config.section import Section


class LoopSection(Section):
    """Training on what an endpoint has answered, from the champion on, and promoting what is better."""

    partition: str = Field(
        "today", pattern=r"^[A-Za-z0-9][A-Za-z0-9._=-]*$",
        description="names this turn: its stages lie in the run NAME-PARTITION, and the same command goes on with them; `today`, "
                    "`yesterday`: those days in UTC")
    min_answers: int = Field(200, ge=1, description="recorded answers below which nothing is trained")
    standing: str | None = Field(
        None, description="JSONL of the prompts on which nothing may be lost; default: bench.prompts, else held-out prompts "
                          "of the run `name`")
    max_drop: float = Field(0.02, ge=0, lt=1, description="share of the champion's tokens per step that new heads may lose there")

    def turn(self) -> str:
        """The partition, with the words that stand for days replaced."""
        days = {"today": 0, "yesterday": 1}
        if self.partition not in days:
            return self.partition
        return (datetime.now(UTC).date() - timedelta(days[self.partition])).isoformat()
