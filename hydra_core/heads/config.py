"""Architecture of a set of draft heads: the part of a checkpoint's config.json that the user chooses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SEQUENTIAL_KINDS = ("hydra", "hydra++")
EAGLE_KINDS = ("eagle", "eagle3")


class HeadsConfig(BaseModel):
    """Architecture of one set of draft heads.

    `kind`: medusa (heads read the hidden state alone), hydra (also the tokens drafted before them), hydra++
    (hydra over a prefix attention layer, deeper MLPs, trained on the teacher's whole distribution), eagle (one decoder layer
    that reads its own output, `num_heads` steps of it), eagle3 (the same over states from inside the base).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["medusa", "hydra", "hydra++", "eagle", "eagle3"] = Field(
        description="what the heads read and how deep they are")
    num_heads: int = Field(4, ge=1, le=16, description="draft heads: the most tokens ahead that are drafted")
    num_blocks: int = Field(0, ge=0, description="MLP blocks a head; 0: 1 for medusa and hydra, 2 for hydra++")
    draft_vocab_size: int = Field(8192, ge=0, description="most frequent tokens that may be drafted; 0: all of them")
    loss: Literal["auto", "data", "teacher", "acceptance", "hybrid"] = Field(
        "auto", description="target: the token itself (data), or the base's distribution by cross-entropy (teacher), by overlap "
                            "(acceptance) or by both (hybrid: cross-entropy first, then the overlap as it grows); auto: "
                            "teacher for hydra++ and eagle, data for the others")
    hybrid_decay: float = Field(3.0, ge=0, description="how fast hybrid changes from cross-entropy to the overlap; 0: never")
    head_decay: float = Field(1.0, gt=0, le=1, description="weight of head i's loss is head_decay ** i; 1: equal weights")
    mask_lost: bool = Field(False, description="heads learn only where every head before them drafts the right token")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the heads while they train")
    normalise_embeddings: bool = Field(True, description="scale token embeddings to RMS 1; false: raw (as published)")
    final_norm: bool = Field(True, description="end heads with an RMSNorm that starts as the base's; false: none (as published)")
    mlp: Literal["residual", "gated"] = Field(
        "residual", description="a head's blocks: x + SiLU(W x + b) (as published) or x + W3 (SiLU(W1 x) * (W2 x))")

    recurrent: bool = Field(
        False, description="hydra and hydra++: one head for all depths, which reads its own output at the token before "
                           "in place of the hidden state, instead of a head per depth")
    skip_bias: bool = Field(False, description="where a block's input is wider than its output, its projection has a bias (as "
                                               "published by Hydra)")
    own_rows: bool = Field(False, description="each head ends in vocabulary rows and a bias of its own (as published by Medusa "
                                              "and Hydra): of imported heads alone, which are not trained further")

    taps: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="eagle3: layers of the base whose inputs are read; default: 2, half, the last but "
                                        "two. llama.cpp reads three alone")

    @model_validator(mode="after")
    def _check_taps(self) -> HeadsConfig:
        if self.taps is not None and not self.reads_taps:
            raise ValueError(f"taps: kind={self.kind} reads the last hidden state alone")
        return self

    @model_validator(mode="after")
    def _check_recurrent(self) -> HeadsConfig:
        if self.recurrent and not self.sequential:
            raise ValueError(f"recurrent heads read the tokens drafted before them, which kind={self.kind} does not")
        if self.recurrent and self.own_rows:
            raise ValueError("recurrent heads are one head, which has no vocabulary rows of its own (own_rows)")
        return self

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: object) -> object:
        """Replace 0 and auto by their meaning, so that a saved config says what was built."""
        if isinstance(values, dict) and values.get("kind") in ("medusa", "hydra", "hydra++", *EAGLE_KINDS):
            plus = values["kind"] in ("hydra++", *EAGLE_KINDS)
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
    def autoregressive(self) -> bool:
        """Whether one layer drafts token after token, from its own output."""
        return self.kind in EAGLE_KINDS

    @property
    def reads_taps(self) -> bool:
        """Whether states from inside the base are read, which rows of features do not hold."""
        return self.kind == "eagle3"

    @property
    def reads_teacher(self) -> bool:
        """Whether the loss uses the base's probabilities, so that every position counts."""
        return self.loss != "data"

    @property
    def prefix_layer(self) -> bool:
        """Whether one extra causal layer runs over the hidden states."""
        return self.kind == "hydra++"
