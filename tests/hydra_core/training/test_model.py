"""A drafter in training: its loss and counts against a loop over rows, heads and positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hydra_core.base import Base
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig, build_drafter
from hydra_core.training.alignment import head_slice
from hydra_core.training.metrics import HeadCounts
from hydra_core.training.model import HeadTraining
from hydra_core.training.packing import FeatureRow, pack_rows
from hydra_core.training.ranks import rank_rows
from hydra_core.tree.simulation import MISS
from tests.hydra_core.training.rows import random_rows

KINDS = ("medusa", "hydra", "hydra++")
SHAPES = ((3, 12), (6, 9), (2, 4), (11, 6))


def make(base: Base, kind: str) -> tuple[HeadDrafter, list[FeatureRow]]:
    torch.manual_seed(1)
    counts = torch.arange(base.vocabulary.size)
    drafter = build_drafter(HeadsConfig(kind=kind), base.vocabulary, DraftVocab.rank(counts, 200, base.stop_ids))  # type: ignore[arg-type]
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return drafter, random_rows(base.vocabulary.size, base.vocabulary.width, shapes=SHAPES)


def by_hand(base: Base, drafter: HeadDrafter, rows: list[FeatureRow],
            first: int) -> tuple[list[float], list[list[int]]]:
    """Summed loss of each head from position prompt - first(head) on, and rank tuples, one position at a time."""
    ids = drafter.draft_vocab.ids
    losses, tuples = [0.0] * drafter.num_heads, []
    for row in rows:
        tokens, length = row.token_ids, len(row.token_ids)
        alone = pack_rows([row])
        features = drafter.features(alone.hidden, alone.positions, alone.mask)[0]
        teacher = torch.softmax(base.logits(row.hidden), -1)[:, ids]
        ranks: dict[int, list[int]] = {}
        for head in range(drafter.num_heads):
            for t in range(length - 2 - head):
                target = int(tokens[t + 2 + head])
                path = drafter.embed(tokens[t + 1:t + 2 + head])
                logits = drafter.draft_logits(drafter.head_hidden(head, features[t], path))
                if t >= row.prompt_tokens - 1:
                    place = (ids == target).nonzero()
                    rank = int((logits > logits[place[0, 0]]).sum()) if len(place) else MISS
                    ranks.setdefault(t, []).append(rank)
                if t + 2 + head < row.prompt_tokens or (first and t < row.prompt_tokens - first):
                    continue
                log_q = F.log_softmax(logits, -1)
                if drafter.config.loss == "teacher":
                    losses[head] -= float((teacher[t + 1 + head] * log_q).sum())
                elif target in ids:
                    losses[head] -= float(log_q[ids == target])
        tuples += [found + [MISS] * (drafter.num_heads - len(found)) for _, found in sorted(ranks.items())]
    return losses, tuples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [None, 20])
def test_loss_equals_the_loop(tiny_base: Base, kind: str, width: int | None) -> None:
    drafter, rows = make(tiny_base, kind)
    divisors = torch.tensor([3.0, 5.0, 7.0, 11.0])
    loss, sums = HeadTraining(drafter, tiny_base.vocabulary)(pack_rows(rows, width), divisors)
    with torch.no_grad():
        wanted, _ = by_hand(tiny_base, drafter, rows, first=0)
    assert sums.tolist() == pytest.approx(wanted, rel=1e-4)
    mean = sum(w / d for w, d in zip(wanted, divisors.tolist(), strict=True)) / 4
    assert loss.item() == pytest.approx(mean, rel=1e-4)
    loss.backward()
    for parameter in drafter.parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_counts_and_ranks(tiny_base: Base, kind: str) -> None:
    drafter, rows = make(tiny_base, kind)
    packed = pack_rows(rows, 20)
    counts, found = HeadTraining(drafter, tiny_base.vocabulary).evaluate(packed)
    with torch.no_grad():
        wanted, tuples = by_hand(tiny_base, drafter, rows, first=1)
    assert found.ranks.tolist() == tuples
    assert found.positions == tuple(response - 1 for _, response in SHAPES)
    assert torch.equal(rank_rows(drafter, packed).ranks, found.ranks)
    assert counts.loss.tolist() == pytest.approx(wanted, rel=1e-4)
    for head in range(4):
        part = head_slice(head, packed.spans, decoding=True)
        assert int(counts.ranked[head]) == part.count
        for top in range(5):
            assert int(counts.hits[head, top]) == sum(row[head] <= top for row in tuples)


def test_counts_add_up_and_survive_a_tensor(tiny_base: Base) -> None:
    """Two ranks' counts together are the counts of all rows."""
    drafter, rows = make(tiny_base, "hydra")
    model = HeadTraining(drafter, tiny_base.vocabulary)
    whole, _ = model.evaluate(pack_rows(rows))
    parts = model.evaluate(pack_rows(rows[:1]))[0] + model.evaluate(pack_rows(rows[1:]))[0]
    summed = HeadCounts.from_tensor(parts.to_tensor())
    assert torch.equal(summed.hits, whole.hits) and torch.equal(summed.ranked, whole.ranked)
    assert torch.equal(summed.outside, whole.outside) and torch.equal(summed.counted, whole.counted)
    assert summed.ratios() == pytest.approx(whole.ratios())
    assert int(whole.outside.sum()) > 0  # the draft vocabulary leaves some out: the data loss must have skipped them
    assert all(int(c) == int(r) - int(o) for c, r, o in zip(whole.counted, whole.ranked, whole.outside, strict=True))


def test_known_normalisers_change_nothing(tiny_base: Base) -> None:
    drafter, rows = make(tiny_base, "hydra++")
    model = HeadTraining(drafter, tiny_base.vocabulary)
    known = [FeatureRow(row.token_ids, row.prompt_tokens, row.hidden, torch.logsumexp(tiny_base.logits(row.hidden), -1))
             for row in rows]
    divisors = torch.ones(4)
    plain, given = model(pack_rows(rows), divisors)[0], model(pack_rows(known), divisors)[0]
    torch.testing.assert_close(plain, given, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, loss", [("medusa", "data"), ("hydra++", "teacher"), ("hydra", "acceptance"),
                                        ("hydra++", "hybrid")])
def test_plain_losses_are_the_same(tiny_base: Base, kind: str, loss: str) -> None:
    """Each head separately with the whole softmax, as usual elsewhere: the same value and gradients as the chunked loss."""
    torch.manual_seed(3)
    vocab = DraftVocab.rank(torch.arange(tiny_base.vocab_size), 150, tiny_base.stop_ids)
    drafter = build_drafter(HeadsConfig(kind=kind, loss=loss, num_heads=3), tiny_base.vocabulary, vocab)
    packed = pack_rows(random_rows(tiny_base.vocab_size, tiny_base.vocabulary.width), 32)
    found = []
    for plain in (False, True):
        drafter.zero_grad()
        total, sums = HeadTraining(drafter, tiny_base.vocabulary, plain)(packed, torch.tensor([9.0, 8.0, 7.0]))
        total.backward()
        found.append((total.detach(), sums, [p.grad.clone() for p in drafter.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-4)
    assert len(found[0][2]) == len(found[1][2]) > 3
    for one, other in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
