"""The settings of `train`."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from hydra_core.heads.config import HeadsConfig
from pipelines.config.base import Workers
from pipelines.config.section import Section


class TrainWorkers(Workers):
    """Workers that step together: with the others' defaults, an override of one field would change the rest."""

    count: int = Field(2, ge=1)
    threads: int = Field(1, ge=1, description="torch threads in each")


class TrainSection(Section):
    """Draft heads on the distilled rows; the base stays frozen."""

    drafters: dict[str, HeadsConfig] = Field(
        default_factory=lambda: {
            "medusa": HeadsConfig(kind="medusa"),
            "hydra": HeadsConfig(kind="hydra"),
            "hydra++": HeadsConfig(kind="hydra++"),
        },
        description="name -> architecture; every one of them is trained unless `only` names one")
    only: str | None = Field(None, description="train just this drafter")
    start: dict[str, str] = Field(default_factory=dict, description="drafter -> heads folder, or `bundled`, whose weights it "
                                                                    "begins with: to go on with more rows; default: untrained")
    dry_run: bool = Field(False, description="train nothing: save untrained heads under `train-dry`, to try serving with")
    features: Literal["stored", "online"] = Field(
        "stored", description="hidden states as distill stored them; online: the base makes them in each worker")
    share: float = Field(1.0, gt=0, le=1, description="of the training rows that are learned from, told by their ids")
    cache_mb: int = Field(512, ge=1, description="stored hidden states each worker keeps; rows are shuffled in such windows")
    epochs: float = Field(4.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    rows_per_step: int = Field(16, ge=1, description="rows in one optimizer step, all workers together")
    learning_rate: float = Field(1e-3, gt=0, alias="lr")
    accumulate: int = Field(1, ge=1, description="pieces that each worker cuts its rows of a step into, one after the other")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="of lr after the warm-up; wsd: constant, then a straight line down")
    warmup_steps: int = Field(20, ge=0)
    decay_share: float = Field(0.2, gt=0, le=1, description="last share of all steps in which wsd goes down")
    final_lr_share: float = Field(0.1, ge=0, le=1, description="where cosine and wsd end, as a share of lr")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights, which are validated and saved then; 0: none")
    stop_ratio: float = Field(4.0, gt=1, description="a loss so many times the first step's stops the run")
    grad_clip: float = Field(1.0, gt=0)
    seed: int = 0
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["bf16", "fp32"] = Field("fp32", description="of the heads while they train")
    plain_losses: bool = Field(False, description="losses as they are written, every head with the base's whole softmax made "
                                                  "anew: the usual way, to compare with")
    workers: TrainWorkers = TrainWorkers()
    validate_every: int = Field(50, ge=1, description="steps between validations, each with a checkpoint")
    validation_rows: int = Field(64, ge=1)
    decode_every: int = Field(0, ge=0, description="steps between real decodings of held-out prompts by a task beside the "
                                                   "training, at validations; 0: none")
    decode_prompts: int = Field(8, ge=1, description="prompts that it decodes")
    decode_tokens: int = Field(64, ge=1, description="new tokens of each")
    decode_cpus: float = Field(0.25, ge=0, description="logical CPUs to reserve for it")
    max_failures: int = Field(2, ge=0, description="times Ray restarts dead workers from the last checkpoint")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _only_is_known(self) -> TrainSection:
        if self.only is not None and self.only not in self.drafters:
            raise ValueError(f"train.only={self.only!r} is none of train.drafters: {', '.join(self.drafters)}")
        if unknown := [name for name in self.start if name not in self.drafters]:
            raise ValueError(f"train.start: {unknown[0]!r} is none of train.drafters: {', '.join(self.drafters)}")
        if self.rows_per_step % (self.workers.count * self.accumulate):
            raise ValueError("train.rows_per_step must be a multiple of train.workers.count x train.accumulate")
        if self.plain_losses and any(heads.mask_lost for heads in self.drafters.values()):
            raise ValueError("train.plain_losses knows no mask_lost: turn one of them off")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={list(self.betas)}: each must be at least 0 and below 1")
        if self.ema and self.zero_stage == 3:
            raise ValueError("train.ema averages whole weights, which ZeRO-3 keeps apart: set train.zero_stage to 2")
        return self
