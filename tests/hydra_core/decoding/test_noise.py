"""The noise is a function of (seed, position, token), and is Gumbel noise."""

from __future__ import annotations

import torch

from hydra_core.decoding import Sampling, choose
from hydra_core.decoding.noise import gumbel, position_key


def test_depends_on_nothing_else() -> None:
    ids = torch.arange(1000)
    keys = [position_key(seed, position) for seed in (0, 1, -5, 2**62) for position in (0, 1, 77)]
    whole = gumbel(keys, ids)
    assert torch.equal(gumbel(keys[5:6], ids)[0], whole[5])
    assert torch.equal(gumbel(keys, ids[300:310]), whole[:, 300:310])
    assert len({tuple(row[:4].tolist()) for row in whole}) == len(keys)
    assert torch.isfinite(whole).all()


def test_is_gumbel() -> None:
    values = gumbel([position_key(3, position) for position in range(200)], torch.arange(5000)).double().flatten()
    assert abs(values.mean() - 0.5772) < 0.005 and abs(values.var() - 1.6449) < 0.02
    for quantile in (0.01, 0.5, 0.99, 0.9999):
        expected = -torch.log(-torch.log(torch.tensor(quantile, dtype=torch.double)))
        assert abs(float((values <= expected).double().mean()) - quantile) < 0.002


def test_draws_follow_the_softmax() -> None:
    """Chi-square of 20,000 draws against the distribution itself, at two temperatures."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5])
    draws = 20_000
    for temperature in (0.7, 1.4):
        sampling = Sampling((temperature,), (11,))
        positions = torch.arange(draws)[None]
        drawn = choose(logits.expand(1, draws, 6), positions, sampling)[0]
        expected = torch.softmax(logits / temperature, 0) * draws
        chi = float(((torch.bincount(drawn, minlength=6) - expected) ** 2 / expected).sum())
        assert chi < 20.5  # 5 degrees of freedom, p = 0.001


def test_greedy_rows_beside_sampled_ones() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 50)
    positions = torch.tensor([[4, 5], [4, 5], [9, 9]])
    found = choose(logits, positions, Sampling((0.0, 1.0, 1.0), (1, 2, 3)))
    assert torch.equal(found[0], logits[0].argmax(-1))
    alone = choose(logits[1:2], positions[1:2], Sampling((1.0,), (2,)))
    assert torch.equal(found[1:2], alone)
