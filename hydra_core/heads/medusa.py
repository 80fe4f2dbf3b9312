"""Medusa: every head reads the hidden state alone (arXiv 2401.10774). The baseline."""

from __future__ import annotations

from torch import Tensor

from hydra_core.heads.base import HeadDrafter


class Medusa(HeadDrafter):
    """Independent heads: they do not depend on the tokens drafted before."""

    def head_hidden(self, i: int, features: Tensor, path: Tensor) -> Tensor:
        hidden: Tensor = self.heads[i](features)
        return hidden
