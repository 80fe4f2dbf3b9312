"""The base's choice at each node, and the drafters' ranking by the same rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.decoding.noise import gumbel, position_key


@dataclass(frozen=True)
class Sampling:
    """How each of B rows draws: `temperatures` and `seeds`, one a row."""

    temperatures: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def greedy(self) -> bool:
        return not any(self.temperatures)

    def perturb(self, logits: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
        """Scores whose argmax is the token drawn: [B, N, n] float32.

        `logits`: [B, N, n] over token `ids` [n]; `positions`: [B, N], where the drawn token will stand. Rows at
        temperature 0 keep their logits. Nodes of one row at one position share their noise.
        """
        if self.greedy:
            return logits
        scores = logits.clone()
        for row, (temperature, seed) in enumerate(zip(self.temperatures, self.seeds, strict=True)):
            if temperature > 0:
                unique, back = torch.unique(positions[row], return_inverse=True)
                noise = gumbel([position_key(seed, int(position)) for position in unique], ids)
                scores[row].div_(temperature).add_(noise[back])
        return scores


def choose(logits: Tensor, positions: Tensor, sampling: Sampling) -> Tensor:
    """Token ids [B, N] int64 that the base emits after each node.

    `logits`: [B, N, V] at the nodes; `positions`: [B, N], where the chosen token will stand (a node's own plus one).
    """
    if sampling.greedy:
        return logits.argmax(-1)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return sampling.perturb(logits, positions, ids).argmax(-1)
