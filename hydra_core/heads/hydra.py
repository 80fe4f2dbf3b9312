"""Hydra: head i also reads the tokens chosen and drafted since the hidden state (arXiv 2402.05109)."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_core.heads.base import HeadDrafter


class Hydra(HeadDrafter):
    """Sequentially dependent heads: hidden state and i + 1 token embeddings side by side.

    `config.recurrent`: one head of fixed width in place of them all. It reads a state and a token's embedding, and what it makes
    of those is the state for the next token, as in ReDrafter (arXiv 2403.09919), here with the head's own norm between. States
    are made anew for every depth: its few matrices stay in the cache, and that is what it is for.
    """

    def head_width(self, i: int) -> int:
        return (2 if self.config.recurrent else i + 2) * self.vocabulary.width

    def head_hidden(self, i: int, features: Tensor, path: Tensor) -> Tensor:
        if not self.config.recurrent:
            return self.heads[i](torch.cat((features, path.flatten(-2)), dim=-1))
        state = features
        for step in range(i + 1):
            state = self.heads[0](torch.cat((state, path[..., step, :]), dim=-1))
        return state
