"""The noise is a function of (seed, choice, position, token), and is Gumbel noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from hydra_core.sampling.noise import HIGHEST, gumbel, position_key

WORD, LONG = 2**32, 2**64


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


def by_hand(seed: int, position: int, choice: int, ids: list[int]) -> list[float]:
    """The noise as published: splitmix64's finalizer over seed, choice and position, then lowbias32 over both words and the id.

    With unbounded integers. Answers to a seed stay what they are when the library changes."""
    def mix64(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % LONG
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % LONG
        return value ^ (value >> 31)

    def mix32(value: int) -> int:
        value = (value ^ (value >> 16)) * 0x7FEB352D % WORD
        value = (value ^ (value >> 15)) * 0x846CA68B % WORD
        return value ^ (value >> 16)

    key = mix64((mix64((mix64(seed % LONG) + choice * 0xD1B54A32D192ED03) % LONG) + position * 0x9E3779B97F4A7C15) % LONG)
    found = []
    for token in ids:
        mixed = mix32(mix32((token * 2654435761) % WORD ^ key % WORD) ^ key // WORD)
        uniform = ((mixed >> 9) + 0.5) / 2**23
        found.append(float(-np.log(-np.log(uniform))))
    return found


@pytest.mark.parametrize(("seed", "position", "choice"), [(0, 0, 0), (1, 5, 0), (-7, 123456, 3), (2**63 - 1, 9, 2**31)])
def test_the_noise_of_a_seed_stays_what_it_is(seed: int, position: int, choice: int) -> None:
    ids = [0, 1, 2, 77, 128_000, 262_143]
    found = gumbel([position_key(seed, position, choice)], torch.tensor(ids))[0]
    np.testing.assert_allclose(found.numpy(), by_hand(seed, position, choice, ids), rtol=2e-4, atol=2e-5)


def test_scipy_takes_it_for_gumbel_noise() -> None:
    """Kolmogorov-Smirnov over the tokens of a position, over the positions of a token, and over choices."""
    ids = torch.arange(20_000)
    for values in (gumbel([position_key(9, 4)], ids)[0],
                   gumbel([position_key(9, position) for position in range(20_000)], ids[5:6])[:, 0],
                   gumbel([position_key(9, 4, choice) for choice in range(20_000)], ids[5:6])[:, 0]):
        assert stats.kstest(values.double().numpy(), stats.gumbel_r.cdf).pvalue > 0.001
