"""The chunked losses against the formulas, values and gradients."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from hydra_core.base import VocabHead
from hydra_core.training.losses import (
    DataTarget,
    Target,
    TeacherTarget,
    chunked_loss,
    chunked_loss_and_best,
    log_partition,
    reference_loss,
    rows_at_once,
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
    rows = torch.randint(0, 11, (N,))
    return [DataTarget(torch.randint(-1, VD, (N,))), TeacherTarget(table, rows), TeacherTarget(table, rows, "acceptance"),
            TeacherTarget(table, rows, "hybrid"), TeacherTarget(table, rows, "hybrid", decay=0.5)]


KINDS = range(5)


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_float64(kind: int) -> None:
    """Against autograd through the formula to the last digits, and where nothing is held constant against differences."""
    matrix = torch.randn(VD, D, dtype=torch.float64)
    hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    target = targets()[kind]

    def fast(at: torch.Tensor) -> torch.Tensor:
        return chunked_loss(at, lambda part: part @ matrix.T, target, 10)

    plain = reference_loss(hidden @ matrix.T, target)
    torch.testing.assert_close(fast(hidden), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(fast(hidden), hidden), torch.autograd.grad(plain, hidden), rtol=1e-10,
                               atol=1e-12)
    if not isinstance(target, TeacherTarget) or target.loss != "hybrid":
        assert torch.autograd.gradcheck(fast, hidden)


def test_overlaps_by_hand() -> None:
    """q is uniform over four; the base leaves 0.1 outside the draft vocabulary."""
    logits, table, at = torch.zeros(1, 4), torch.tensor([[0.6, 0.2, 0.1, 0.0]]), torch.tensor([0])
    overlap = 0.25 + 0.2 + 0.1
    loss = reference_loss(logits, TeacherTarget(table, at, "acceptance"))
    assert loss.item() == pytest.approx(-math.log(overlap), abs=1e-6)
    share, crossed = math.exp(-3.0 * overlap), 0.9 * math.log(4)
    loss = reference_loss(logits, TeacherTarget(table, at, "hybrid", decay=3.0))
    assert loss.item() == pytest.approx(share * crossed + (1 - share) * (1 - overlap), abs=1e-6)
    whole = torch.softmax(torch.randn(1, 4), -1)
    assert reference_loss(whole.log(), TeacherTarget(whole, at, "acceptance")).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("decay", [0.0, 100.0])
def test_hybrid_lies_between_cross_entropy_and_overlap(decay: float) -> None:
    logits, table = torch.randn(3, 6), torch.softmax(torch.randn(3, 6), -1)
    rows = torch.arange(3)
    got = reference_loss(logits, TeacherTarget(table, rows, "hybrid", decay))
    distance = (table - logits.softmax(-1)).abs().sum() / 2
    torch.testing.assert_close(got, reference_loss(logits, TeacherTarget(table, rows)) if decay == 0 else distance,
                               rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["acceptance", "hybrid"])
def test_equal_probabilities_share_the_gradient(loss: Literal["acceptance", "hybrid"]) -> None:
    """Some entries of the table are q itself to the last bit, the others above and below it: there min has a corner."""
    logits = torch.randn(5, 8, requires_grad=True)
    table = F.log_softmax(logits, -1).exp().detach() * torch.tensor([1.0, 1.0, 1.0, 0.5, 2.0, 1.0, 0.0, 1.0])
    target = TeacherTarget(table, torch.arange(5), loss)
    (wanted,) = torch.autograd.grad(reference_loss(logits, target), logits)
    (got,) = torch.autograd.grad(chunked_loss(logits, lambda part: part, target, 2), logits)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    moved = TeacherTarget(table * (1 - 1e-4), target.rows, loss)
    (other,) = torch.autograd.grad(reference_loss(logits, moved), logits)
    assert (other - wanted).abs().max() > 0.02  # a corner: to one side of it the slope is another


def test_a_hopeless_head_still_gets_a_gradient() -> None:
    """Overlaps of 1e-35 and of exactly 0: the loss stays finite, and its slope at most 1."""
    logits = torch.tensor([[0.0, 80.0, 0.0], [0.0, 500.0, 0.0]], requires_grad=True)
    target = TeacherTarget(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0, 0]), "acceptance")
    loss = chunked_loss(logits, lambda part: part, target)
    loss.backward()
    assert torch.isfinite(loss) and logits.grad is not None and torch.isfinite(logits.grad).all()
    torch.testing.assert_close(logits.grad[0], torch.tensor([-1.0, 1.0, 0.0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [5, 64])
def test_best_is_the_likeliest(head: VocabHead, kind: int, chunk: int) -> None:
    target, hidden = targets()[kind], torch.randn(N, D, requires_grad=True)
    loss, best = chunked_loss_and_best(hidden, head.restrict(torch.arange(VD)), target, chunk)
    assert torch.equal(best, head.restrict(torch.arange(VD))(hidden).argmax(-1)) and not best.requires_grad
    assert torch.equal(loss, chunked_loss(hidden, head.restrict(torch.arange(VD)), target, chunk))


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
    got = teacher_probabilities(hidden, head.restrict(ids), log_partition(hidden, head, chunk), chunk)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert got.sum(-1).max() < 1.0  # not renormalised


def test_chunks_are_those_of_the_device(head: VocabHead) -> None:
    """Unless another size is asked for; what is computed is the same, to the last row."""
    assert rows_at_once(torch.zeros(1)) == 128 and rows_at_once(torch.zeros(1, device="meta")) == 1024
    hidden, ids, sizes = torch.randn(300, D), torch.arange(VD), list[int]()

    def project(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return head(states)

    found = log_partition(hidden, project)
    assert sizes == [128, 128, 44]
    torch.testing.assert_close(found, torch.logsumexp(head(hidden), -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_partition(hidden, project, 200), found)
    assert sizes[3:] == [200, 100]
    draft, sizes = head.restrict(ids), []
    wanted = torch.softmax(head(hidden), -1)[:, ids]

    def restricted(states: torch.Tensor) -> torch.Tensor:
        sizes.append(len(states))
        return draft(states)

    torch.testing.assert_close(teacher_probabilities(hidden, restricted, found), wanted, rtol=1e-5, atol=1e-6)
    assert sizes == [128, 128, 44]


def test_nothing_in_gives_zero(head: VocabHead) -> None:
    hidden = torch.empty(0, D, requires_grad=True)
    loss = chunked_loss(hidden, head, DataTarget(torch.empty(0, dtype=torch.int64)))
    loss.backward()
    assert loss.item() == 0.0
