"""The settings of `curve`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.config.section import Section, Size

Share = Annotated[float, Field(gt=0, le=1)]


class CurveSection(Section):
    """Held-out tokens per step over the number of training rows, and what more rows would bring."""

    drafters: tuple[str, ...] = Field((), description="names among train.drafters; default: train.only, or all of them")
    shares: tuple[Share, ...] = Field(
        (0.0625, 0.125, 0.25, 0.5, 1.0), min_length=1,
        description="shares of the training rows, a training for each; ids of rows decide, a larger share holds a smaller one")
    seeds: tuple[int, ...] = Field((0, 1), min_length=1, description="one training of each share for each, as train.seed")
    steps_per_share: Literal["epochs", "equal"] = Field(
        "epochs", description="epochs: every share is passed over train.epochs times, as a training with so many rows would be; "
                              "equal: every share takes as many steps as the largest one")
    least_steps: int = Field(100, ge=1, description="fewest optimizer steps of a training: a small share is passed over more "
                                                    "often")
    ahead: tuple[Annotated[float, Field(gt=1)], ...] = Field(
        (2.0, 4.0), min_length=1, description="times the rows for which the curve is asked")
    more_prompts: Size = Field(30_000, description="further prompts whose cost is told")

    @model_validator(mode="after")
    def _each_once(self) -> CurveSection:
        for name in ("drafters", "shares", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"curve.{name}={list(values)}: names one twice")
        return self
