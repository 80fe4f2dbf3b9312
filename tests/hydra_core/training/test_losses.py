"""The chunked losses against the formulas, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hydra_core.base import VocabHead
from hydra_core.training.losses import (
    DataTarget,
    Target,
    TeacherTarget,
    chunked_loss,
    log_normalisers,
    reference_loss,
    teacher_probabilities,
)

N, D, V, VD = 37, 8, 50, 20


@pytest.fixture
def head() -> VocabHead:
    torch.manual_seed(3)
    return VocabHead(torch.randn(V, D), torch.randn(V), scale=0.7, softcap=4.0)


def targets() -> list[Target]:
    torch.manual_seed(4)
    table = torch.softmax(torch.randn(11, V), -1)[:, :VD]  # gathered, not renormalised: rows sum to less than 1
    return [DataTarget(torch.randint(-1, VD, (N,))), TeacherTarget(table, torch.randint(0, 11, (N,)))]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("chunk", [1, 7, 37, 100])
def test_value_and_gradient_equal_the_plain_formula(head: VocabHead, kind: int, chunk: int) -> None:
    target, draft = targets()[kind], head.restrict(torch.arange(VD))
    hidden = torch.randn(N, D, requires_grad=True)
    plain = reference_loss(draft(hidden), target) * 0.37
    (wanted,) = torch.autograd.grad(plain, hidden)
    fast = chunked_loss(hidden, draft, target, chunk) * 0.37
    (got,) = torch.autograd.grad(fast, hidden)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert wanted.abs().max() > 1e-3


def test_the_reference_is_cross_entropy_as_written(head: VocabHead) -> None:
    """One position by hand: data, then teacher with mass outside the draft vocabulary."""
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    log_q = [value - math.log(sum(math.exp(v) for v in (1.0, 2.0, 0.5))) for value in (1.0, 2.0, 0.5)]
    assert reference_loss(logits, DataTarget(torch.tensor([2]))).item() == pytest.approx(-log_q[2], abs=1e-6)
    table = torch.tensor([[0.5, 0.2, 0.1]])  # 0.2 of the base's mass cannot be drafted
    wanted = -(0.5 * log_q[0] + 0.2 * log_q[1] + 0.1 * log_q[2])
    assert reference_loss(logits, TeacherTarget(table, torch.tensor([0]))).item() == pytest.approx(wanted, abs=1e-6)


def test_targets_outside_the_draft_vocabulary_do_not_count(head: VocabHead) -> None:
    draft = head.restrict(torch.arange(VD))
    hidden = torch.randn(3, D, requires_grad=True)
    target = DataTarget(torch.tensor([-1, 5, -1]))
    assert int(target.valid) == 1
    loss = chunked_loss(hidden, draft, target)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(draft(hidden[1:2]), torch.tensor([5])))
    assert hidden.grad is not None and hidden.grad[[0, 2]].abs().max() == 0 and hidden.grad[1].abs().max() > 0


@pytest.mark.parametrize("chunk", [4, 64])
def test_teacher_is_the_full_softmax_gathered(head: VocabHead, chunk: int) -> None:
    hidden, ids = torch.randn(N, D), torch.randperm(V)[:VD]
    wanted = torch.softmax(head(hidden), -1)[:, ids]
    got = teacher_probabilities(hidden, head.restrict(ids), log_normalisers(hidden, head, chunk), chunk)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert got.sum(-1).max() < 1.0  # not renormalised


def test_nothing_in_gives_zero(head: VocabHead) -> None:
    hidden = torch.empty(0, D, requires_grad=True)
    loss = chunked_loss(hidden, head, DataTarget(torch.empty(0, dtype=torch.int64)))
    loss.backward()
    assert loss.item() == 0.0
