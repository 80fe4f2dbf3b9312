"""Hydra: head i also reads the tokens chosen and drafted since the hidden state (arXiv 2402.05109)."""

from __future__ import annotations

import torch
from torch import Tensor

from hydra_core.heads.base import HeadDrafter


class Hydra(HeadDrafter):
    """Sequentially dependent heads: hidden state and i + 1 token embeddings side by side.

    `config.recurrent`: one head of fixed width for all depths. It reads a state and a token's embedding, and its output is the
    state for the next token, as in ReDrafter (arXiv 2403.09919), here with the head's own norm in between. States are computed
    again for every depth: the purpose is that the few matrices stay in the processor's cache.
    """

    def head_width(self, i: int) -> int:
        return (2 if self.config.recurrent else i + 2) * self.vocabulary.width

    def head_hidden(self, i: int, features: Tensor, path: Tensor) -> Tensor:
        if not self.config.recurrent:
            hidden: Tensor = self.heads[i](torch.cat((features, path.flatten(-2)), dim=-1))
            return hidden
        state = features
        for step in range(i + 1):
            state = self.heads[0](torch.cat((state, path[..., step, :]), dim=-1))
        return state
