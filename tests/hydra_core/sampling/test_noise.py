"""The noise is a function of (seed, choice, position, token), and is Gumbel noise."""

from __future__ import annotations

import torch

from hydra_core.sampling.noise import HIGHEST, gumbel, position_key


def test_depends_on_nothing_else() -> None:
    ids = torch.arange(1000)
    keys = [position_key(seed, position, choice) for seed in (0, 1, -5, 2**62) for position in (0, 1, 77)
            for choice in (0, 1)]
    whole = gumbel(keys, ids)
    assert torch.equal(gumbel(keys[5:6], ids)[0], whole[5])
    assert torch.equal(gumbel(keys, ids[300:310]), whole[:, 300:310])
    assert len({tuple(row[:4].tolist()) for row in whole}) == len(keys)
    assert torch.isfinite(whole).all() and whole.max() < HIGHEST
    some = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:333]
    assert torch.equal(gumbel(keys[3:4], some)[0], whole[3, some])


def test_is_gumbel() -> None:
    values = gumbel([position_key(3, position) for position in range(200)], torch.arange(5000)).double().flatten()
    assert abs(values.mean() - 0.5772) < 0.005 and abs(values.var() - 1.6449) < 0.02
    for quantile in (0.01, 0.5, 0.99, 0.9999):
        expected = -torch.log(-torch.log(torch.tensor(quantile, dtype=torch.double)))
        assert abs(float((values <= expected).double().mean()) - quantile) < 0.002
