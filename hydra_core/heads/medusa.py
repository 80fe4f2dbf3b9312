"""Medusa: every head reads the hidden state alone (arXiv 2401.10774). The baseline."""

from __future__ import annotations

from torch import Tensor

from hydra_core.heads.base import HeadDrafter


class Medusa(HeadDrafter):
    """Independent heads: what was drafted before makes no difference to them."""

    def head_hidden(self, i: int, features: Tensor, path: Tensor) -> Tensor:
        return self.heads[i](features)
