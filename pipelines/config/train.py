"""The settings of `train`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from hydra_core.heads.config import HeadsConfig
from pipelines.config.base import Reserved
from pipelines.config.section import Section, Size


class TrainWorkers(Reserved):
    """Training workers. They have a class of their own so that overriding one field keeps these defaults of the others."""

    count: Size | tuple[Size, Size] = Field(
        2, description="how many of them; they step together. [least, most]: as many as there is room for, now and later")
    threads: int = Field(1, ge=1, description="torch threads in each")

    @field_validator("count", mode="before")
    @classmethod
    def _is_one_number_or_two(cls, value: Any) -> Any:
        numbers = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        if not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError(f"must be a whole number above 0, or [least, most], got {value}")
        return value

    @model_validator(mode="after")
    def _least_is_no_more_than_most(self) -> TrainWorkers:
        if self.least > self.most:
            raise ValueError(f"train.workers.count=[{self.least},{self.most}]: the first is more than the second")
        return self

    @property
    def least(self) -> int:
        """Fewest workers that train."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        """Most workers that train."""
        return self.count if isinstance(self.count, int) else self.count[1]


class TrainSection(Section):
    """Training of draft heads on the distilled rows."""

    drafters: dict[str, HeadsConfig] = Field(
        default_factory=lambda: {
            "medusa": HeadsConfig(kind="medusa"),
            "hydra": HeadsConfig(kind="hydra"),
            "hydra++": HeadsConfig(kind="hydra++"),
        },
        description="name -> architecture; all are trained unless `only` names one")
    only: str | None = Field(None, description="train this drafter alone")
    start: dict[str, str] = Field(default_factory=dict, description="drafter -> heads folder, or `bundled`, whose weights it "
                                                                    "starts from, for example with more rows; default: random")
    also: tuple[str, ...] = Field((), description="names of other runs (`name=`) whose distilled rows are learned too, and held "
                                                  "out too, by `tree` as well: new rows are added to old ones")
    dry_run: bool = Field(False, description="train nothing; save untrained heads under `train-dry`, to try serving with")
    features: Literal["stored", "online"] = Field(
        "stored", description="where hidden states come from. stored: files of distill; online: each worker runs the base")
    share: float = Field(1.0, gt=0, le=1, description="share of the training rows to use; their ids decide which")
    cache_mb: int = Field(512, ge=1, description="MiB of stored hidden states in each worker; rows are shuffled within them")
    epochs: float = Field(4.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; default: what `epochs` makes")
    rows_per_step: int = Field(16, ge=1, description="rows in one optimizer step, all workers together")
    learning_rate: float = Field(1e-3, gt=0, alias="lr", description="highest learning rate")
    accumulate: int = Field(1, ge=1, description="micro-batches into which each worker cuts its rows of a step")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="of lr after the warm-up; wsd: constant, then linear decay")
    warmup_steps: int = Field(20, ge=0, description="steps in which lr rises from 0")
    decay_share: float = Field(0.2, gt=0, le=1, description="share of all steps, at the end, in which wsd decays")
    final_lr_share: float = Field(0.1, ge=0, le=1, description="last learning rate of cosine and wsd, as a share of lr")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights (EMA), which are validated and saved; 0: none")
    stop_ratio: float = Field(4.0, gt=1, description="stop the run when the loss is this many times the first step's")
    grad_clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    seed: int = Field(0, description="of initial weights, dropout and the order of rows")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    precision: Literal["bf16", "fp32"] = Field("fp32", description="number format of the heads while they train")
    plain_losses: bool = Field(False, description="compute losses in the usual way, with the base's whole softmax for "
                                                  "every head: slower, to compare with")
    workers: TrainWorkers = TrainWorkers()
    validate_every: int = Field(50, ge=1, description="steps between validations, each with a checkpoint")
    validation_rows: int = Field(64, ge=1, description="held-out rows of each validation")
    validation_seed: int | None = Field(None, description="of the choice of those rows; default: train.seed")
    decode_every: int = Field(0, ge=0, description="steps between evaluations that really decode held-out prompts, in a "
                                                   "task beside the training; a validation starts them; 0: none")
    decode_prompts: int = Field(8, ge=1, description="prompts of such an evaluation")
    decode_tokens: int = Field(64, ge=1, description="new tokens for each of them")
    decode_cpus: float = Field(0.25, ge=0, description="logical CPUs to reserve for that task")
    decode_gpus: float | None = Field(None, ge=0, description="GPUs to reserve for it, 0 for a CPU; default: one, if the "
                                                              "training has GPUs and leaves one free")
    max_failures: int = Field(2, ge=0, description="how often Ray restarts dead workers from the last checkpoint")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _only_is_known(self) -> TrainSection:
        if self.only is not None and self.only not in self.drafters:
            raise ValueError(f"train.only={self.only!r} is none of train.drafters: {', '.join(self.drafters)}")
        if unknown := [name for name in self.start if name not in self.drafters]:
            raise ValueError(f"train.start: {unknown[0]!r} is none of train.drafters: {', '.join(self.drafters)}")
        if self.plain_losses and any(heads.mask_lost for heads in self.drafters.values()):
            raise ValueError("train.plain_losses knows no mask_lost: turn one of them off")
        if own := [name for name, heads in self.drafters.items() if heads.own_rows]:
            raise ValueError(f"train.drafters.{own[0]}.own_rows: only imported heads have vocabulary rows of their own, and "
                             "those are not trained further: leave it false")
        if self.features != "online" and (inside := [name for name, heads in self.drafters.items() if heads.reads_taps]):
            raise ValueError(f"train.drafters.{inside[0]}.kind: eagle3 reads states from inside the base, which stored rows do "
                             "not hold: set train.features=online")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={list(self.betas)}: each must be at least 0 and below 1")
        if self.ema and self.zero_stage == 3:
            raise ValueError("train.ema averages whole weights, which ZeRO-3 keeps apart: set train.zero_stage to 2")
        return self
