"""An exponential average of the weights while they train: smoother heads than any single step leaves behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.config import TrainSection

AVERAGE = "average.safetensors"


class WeightAverage:
    """Averages of a model's trained tensors, float32, the same on every rank.

    `decay` is reached slowly: update n (from 0) keeps (1 + n) / (10 + n) of what stood before until that is more than
    `decay`, so that the untrained weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())
        self._decay = decay
        self._values = {name: tensor.detach().float().clone() for name, tensor in self._parameters.items()}

    @classmethod
    def asked_for(cls, model: nn.Module, train: TrainSection) -> WeightAverage | None:
        """The average that `train.ema` asks for, or None."""
        return cls(model, train.ema) if train.ema else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`: a function of them, the average and the step alone."""
        kept = min(self._decay, (1 + step) / (10 + step))
        for name, value in self._values.items():
            value.lerp_(self._parameters[name].detach().float(), 1 - kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again, to the last bit, afterwards."""
        own = {name: tensor.detach().clone() for name, tensor in self._parameters.items()}
        self._fill(self._values)
        try:
            yield
        finally:
            self._fill(own)

    def save(self, folder: Path) -> None:
        """Write the averages into a checkpoint's folder."""
        save_file({name: value.cpu() for name, value in self._values.items()}, folder / AVERAGE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        for name, value in load_file(folder / AVERAGE).items():
            self._values[name].copy_(value)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)
