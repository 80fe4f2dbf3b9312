"""What a trained drafter is made of: the part of a checkpoint's config.json that is a choice."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SEQUENTIAL_KINDS = ("hydra", "hydra++")


class HeadsConfig(BaseModel):
    """Architecture of one set of draft heads.

    `kind`: medusa (heads read the hidden state alone), hydra (also the tokens drafted before them), hydra++
    (hydra over a prefix attention layer, deeper MLPs, trained on the teacher's whole distribution).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["medusa", "hydra", "hydra++"]
    num_heads: int = Field(4, ge=1, le=16)
    num_blocks: int = Field(0, ge=0, description="MLP blocks a head; 0: 1 for medusa and hydra, 2 for hydra++")
    draft_vocab_size: int = Field(8192, ge=0, description="most frequent tokens that may be drafted; 0: all of them")
    loss: Literal["auto", "data", "teacher"] = Field(
        "auto", description="target: the token itself or the base's distribution; auto: teacher for hydra++ only")
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: object) -> object:
        """Turn 0 and auto into what they stand for, so that a saved config says what was built."""
        if isinstance(values, dict) and values.get("kind") in ("medusa", "hydra", "hydra++"):
            plus = values["kind"] == "hydra++"
            values = dict(values)
            if not values.get("num_blocks"):
                values["num_blocks"] = 2 if plus else 1
            if values.get("loss", "auto") == "auto":
                values["loss"] = "teacher" if plus else "data"
        return values

    @property
    def sequential(self) -> bool:
        """Whether head i also reads the tokens drafted before it."""
        return self.kind in SEQUENTIAL_KINDS

    @property
    def prefix_layer(self) -> bool:
        """Whether one extra causal layer runs over the hidden states."""
        return self.kind == "hydra++"
