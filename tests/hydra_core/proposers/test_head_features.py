"""What heads read of each sequence: the newest hidden state, or what the prefix layer makes of all of them."""

from __future__ import annotations

import pytest
import torch

from hydra_core.base import Base
from hydra_core.proposers import head_features
from hydra_core.proposers.head_features import ROOM, HeadFeatures
from tests.trained import random_heads

LENGTH = 2 * ROOM + 5


@pytest.mark.parametrize("kind", ["hydra", "hydra++"])
def test_a_prompt_at_once_is_read_as_in_pieces(tiny_base: Base, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A long prompt is read in chunks, a short addition is kept until it is needed: each gives the same features."""
    monkeypatch.setattr(head_features, "PREFILL_CHUNK", 7)
    heads = random_heads(tiny_base, kind)
    states = torch.randn(3, LENGTH, heads.weight.shape[0], generator=torch.Generator().manual_seed(4))
    lengths = torch.tensor([LENGTH, 3, LENGTH - 6])
    whole, pieces = (HeadFeatures(heads, 4, 2 * LENGTH) for _ in range(2))
    for one in (whole, pieces):
        for row in range(1, 4):
            one.clear(row)
    with torch.inference_mode():
        whole.commit((1, 4), states, lengths)
        for start in range(0, LENGTH, 2):
            piece = states[:, start:start + 2]
            pieces.commit((1, 4), piece, (lengths - start).clamp(0, piece.shape[1]))
            pieces.catch_up()
        whole.catch_up()
    torch.testing.assert_close(whole.features[1:], pieces.features[1:], atol=1e-5, rtol=1e-4)
    assert not whole.features[0].any()
    if kind == "hydra":
        assert all(torch.equal(whole.features[row + 1], states[row, length - 1]) for row, length in enumerate(lengths))
    else:
        assert whole.cache is not None and whole.cache.lengths[1:].tolist() == lengths.tolist()
