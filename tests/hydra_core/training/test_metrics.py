"""Counts of heads, and the ratios made of them, by hand."""

from __future__ import annotations

import torch

from hydra_core.training.metrics import TOP, HeadCounts


def counts(shift: int = 0) -> HeadCounts:
    return HeadCounts(torch.tensor([6.0, 1.5], dtype=torch.float64) + shift, torch.tensor([4, 2]) + shift,
                      torch.tensor([10, 0]) + shift,
                      torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 0, 0]]) + shift, torch.tensor([3, 1]) + shift)


def test_ratios() -> None:
    """The loss by the positions it counted, hits and tokens outside by the ranked positions; nothing counted gives no error."""
    assert counts().ratios() == {
        "head0_loss": 1.5, "head0_outside": 0.3, "head0_top1": 0.1, "head0_top2": 0.2, "head0_top3": 0.3, "head0_top4": 0.4,
        "head0_top5": 0.5, "head1_loss": 0.75, "head1_outside": 1.0, "head1_top1": 0.0, "head1_top2": 0.0, "head1_top3": 0.0,
        "head1_top4": 0.0, "head1_top5": 0.0}
    nothing = HeadCounts.zeros(2)
    assert nothing.ratios() == dict.fromkeys(counts().ratios(), 0.0)
    assert (nothing.loss.dtype, nothing.hits.shape) == (torch.float64, (2, TOP))
    assert {nothing.counted.dtype, nothing.ranked.dtype, nothing.hits.dtype, nothing.outside.dtype} == {torch.int64}


def test_sums_and_the_way_over_ranks() -> None:
    """Every count goes to its own place in the one tensor that is summed over ranks, and whole numbers stay whole."""
    summed = counts() + counts(100)
    assert summed.loss.tolist() == [112.0, 103.0] and summed.counted.tolist() == [108, 104] and summed.ranked.tolist() == [120,
                                                                                                                           100]
    assert summed.hits.tolist() == [[102, 104, 106, 108, 110], [100] * 5] and summed.outside.tolist() == [106, 102]
    sent = summed.to_tensor()
    assert sent.dtype == torch.float64 and sent.shape == (2, 4 + TOP)
    back = HeadCounts.from_tensor(sent)
    for name in ("loss", "counted", "ranked", "hits", "outside"):
        assert torch.equal(getattr(back, name), getattr(summed, name)) and getattr(back, name).dtype == getattr(summed,
                                                                                                                name).dtype
    assert back.ratios() == summed.ratios()
    assert HeadCounts.from_tensor(sent - 1e-9).counted.tolist() == [108, 104]  # rounded, not cut
