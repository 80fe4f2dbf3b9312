"""Rows in which every value tells its row and position."""

from __future__ import annotations

import torch

from hydra_core.training.packing import FeatureRow

NAMES = ((3, 7), (5, 5), (1, 2), (2, 1), (4, 9))
"""Prompt and response tokens of the rows below."""


def numbered_rows() -> list[FeatureRow]:
    """Token at position t of row r is 1000 (r + 1) + t; its hidden state is that number + 0.5, two wide."""
    rows = []
    for number, (prompt, response) in enumerate(NAMES):
        ids = 1000 * (number + 1) + torch.arange(prompt + response)
        rows.append(FeatureRow(ids, prompt, (ids + 0.5)[:, None].repeat(1, 2)))
    return rows


def random_rows(vocab: int, width: int, seed: int = 0, shapes: tuple[tuple[int, int], ...] = NAMES) -> list[FeatureRow]:
    """Rows of random tokens and hidden states."""
    generator = torch.Generator().manual_seed(seed)
    return [FeatureRow(torch.randint(3, vocab, (prompt + response,), generator=generator), prompt,
                       torch.randn(prompt + response, width, generator=generator)) for prompt, response in shapes]
