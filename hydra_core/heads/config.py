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

    kind: Literal["medusa", "hydra", "hydra++"] = Field(description="what the heads read and how deep they are")
    num_heads: int = Field(4, ge=1, le=16, description="draft heads: the most tokens ahead that are drafted")
    num_blocks: int = Field(0, ge=0, description="MLP blocks a head; 0: 1 for medusa and hydra, 2 for hydra++")
    draft_vocab_size: int = Field(8192, ge=0, description="most frequent tokens that may be drafted; 0: all of them")
    loss: Literal["auto", "data", "teacher", "acceptance", "hybrid"] = Field(
        "auto", description="target: the token itself (data) or the base's distribution: its cross-entropy (teacher), the "
                            "overlap with it (acceptance), from the one to the other as the overlap grows (hybrid); auto: "
                            "teacher for hydra++, data for the others")
    hybrid_decay: float = Field(3.0, ge=0, description="how soon hybrid leaves cross-entropy for the overlap; 0: never")
    head_decay: float = Field(1.0, gt=0, le=1, description="head i's loss weighs head_decay ** i; 1: all the same")
    mask_lost: bool = Field(False, description="heads learn only where every head before them drafts the right token")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the heads while they train")
    normalise_embeddings: bool = Field(True, description="token embeddings brought to RMS 1; false: as they are (published)")
    final_norm: bool = Field(True, description="an RMSNorm ends each head, started as the base's own; false: none (published)")
    mlp: Literal["residual", "gated"] = Field(
        "residual", description="a head's blocks: x + SiLU(W x + b) (published) or x + W3 (SiLU(W1 x) * (W2 x))")

    recurrent: bool = Field(
        False, description="hydra and hydra++: one head for every depth, fed with what it made of the token before in place of "
                           "the hidden state, instead of one of its own for each")

    @model_validator(mode="after")
    def _hears_tokens(self) -> HeadsConfig:
        if self.recurrent and not self.sequential:
            raise ValueError(f"recurrent heads hear the tokens drafted before them: not with kind={self.kind}")
        return self

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
    def reads_teacher(self) -> bool:
        """Whether the loss is made of the base's probabilities, so that every position counts."""
        return self.loss != "data"

    @property
    def prefix_layer(self) -> bool:
        """Whether one extra causal layer runs over the hidden states."""
        return self.kind == "hydra++"
