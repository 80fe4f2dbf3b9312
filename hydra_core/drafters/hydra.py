"""Hydra: head i also reads the tokens chosen and drafted since the hidden state (arXiv 2402.05109)."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_core.drafters.heads import HeadDrafter


class Hydra(HeadDrafter):
    """Sequentially dependent heads: hidden state and i + 1 token embeddings side by side."""

    def head_width(self, i: int) -> int:
        return (i + 2) * self.vocabulary.width

    def head_hidden(self, i: int, features: Tensor, path: Tensor) -> Tensor:
        return self.heads[i](torch.cat((features, path.flatten(-2)), dim=-1))
