"""The state of a training worker: its settings, and the objects that it sets up from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hydra_core.base import BaseVocabulary
from hydra_core.heads import DraftVocab, HeadsConfig
from hydra_core.training.model import HeadTraining
from pipelines.config import TrainSection
from pipelines.rows.packed_reader import ProcessGroup, RowReader
from pipelines.train.ema import WeightAverage

CURVE, HEADS, LAST, LOGGED = "curve.jsonl", "heads", "last", "logged.json"


@dataclass(frozen=True)
class LoopSettings:
    """What the driver sends to each worker; plain values only, since they are serialised.

    `rows`: folder of the training rows: features, or answers for online features; `held_out`: folder of the features that
    validation reads; `halving`: the fields of `halving.Halving` for a trial of a search.
    """

    config: dict[str, Any]
    drafter: str
    rows: str
    held_out: str
    folder: str
    tracking_uri: str | None
    run_id: str | None
    provenance: dict[str, Any]
    halving: dict[str, Any] | None = None


@dataclass
class TrainContext:
    """Everything that a worker needs while it trains."""

    settings: LoopSettings
    train: TrainSection
    heads: HeadsConfig
    group: ProcessGroup
    device: torch.device
    vocabulary: BaseVocabulary
    draft_vocab: DraftVocab
    learn: RowReader
    held_out: RowReader
    total: int
    engine: Any
    average: WeightAverage | None = None
    lanes: int | None = None
    """`BatchOrder.lanes` of a resumed run, and of every run from its first step on."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    next_step: int = 0
    validated: float | None = None
    """Tokens per step of the validation after `next_step` steps, None if there was none."""

    @property
    def first(self) -> bool:
        return self.group.rank == 0

    @property
    def model(self) -> HeadTraining:
        module: HeadTraining = self.engine.module
        return module
