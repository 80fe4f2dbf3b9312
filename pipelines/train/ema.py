"""An exponential moving average of the weights during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydra_core.files import atomic_file
from pipelines.config import TrainSection

AVERAGE = "average.safetensors"


class WeightAverage:
    """Averages of a model's trained tensors, float32, the same on every rank.

    Update n (from 0) keeps the share min(`decay`, (1 + n) / (10 + n)) of the average: a warm-up of the decay, so that the
    untrained weights lose their influence soon.
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
        """Add the weights after optimizer step `step` to the average, which depends on these and on `step` alone."""
        kept = min(self._decay, (1 + step) / (10 + step))
        for name, value in self._values.items():
            value.lerp_(self._parameters[name].detach().float(), 1 - kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights inside the block; afterwards it has its own again, bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in self._parameters.items()}
        self._fill(self._values)
        try:
            yield
        finally:
            self._fill(own)

    def save(self, folder: Path) -> None:
        """Write the averages into the folder of a checkpoint."""
        with atomic_file(folder / AVERAGE) as temporary:
            save_file({name: value.cpu() for name, value in self._values.items()}, temporary)

    def load(self, folder: Path) -> None:
        """Read the averages that `save` wrote."""
        for name, value in load_file(folder / AVERAGE).items():
            self._values[name].copy_(value)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)
