"""Training objectives: which positions count, the weight of each head, and that every choice learns."""

from __future__ import annotations

import pytest
import torch

from hydra_core.base import Base
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig, build_drafter
from hydra_core.training.losses import DataTarget, Target, TeacherTarget, reference_loss
from hydra_core.training.model import HeadTraining
from hydra_core.training.packing import FeatureRow, pack_rows
from tests.hydra_core.training.rows import random_rows

SHAPES = ((3, 12), (6, 9), (2, 4), (1, 14))
FIELDS: dict[str, dict[str, object]] = {
    "data": {"loss": "data"}, "teacher": {"loss": "teacher"}, "acceptance": {"loss": "acceptance"},
    "hybrid": {"loss": "hybrid"}, "decay": {"head_decay": 0.8}, "masked": {"mask_lost": True},
    "masked acceptance": {"loss": "acceptance", "mask_lost": True, "head_decay": 0.9},
    "gated": {"mlp": "gated"}, "raw embeddings": {"normalise_embeddings": False}, "no norm": {"final_norm": False},
    "recurrent": {"recurrent": True},
    "as published": {"num_blocks": 4, "dropout": 0.2, "normalise_embeddings": False, "final_norm": False},
    "everything": {"mlp": "gated", "num_blocks": 3, "dropout": 0.1, "normalise_embeddings": False, "final_norm": False,
                   "loss": "hybrid", "hybrid_decay": 10.0, "mask_lost": True, "head_decay": 0.8}}


def make(base: Base, kind: str, **fields: object) -> tuple[HeadTraining, list[FeatureRow]]:
    torch.manual_seed(1)
    config = HeadsConfig.model_validate({"kind": kind, **fields})
    vocab = DraftVocab.rank(torch.arange(base.vocabulary.size), 200, base.stop_ids)
    drafter = build_drafter(config, base.vocabulary, vocab)
    return HeadTraining(drafter, base.vocabulary), random_rows(base.vocabulary.size, base.vocabulary.width, shapes=SHAPES)


def learn(model: HeadTraining, rows: list[FeatureRow], steps: int) -> list[float]:
    """The loss before each of `steps` steps over the same rows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    curve = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = model(pack_rows(rows, 20), torch.full((model.drafter.num_heads,), 30.0))
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def by_hand(base: Base, drafter: HeadDrafter, rows: list[FeatureRow]) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Each head's loss, one position at a time, with the positions it learns from and those it was masked at."""
    ids, config = drafter.draft_vocab.ids, drafter.config
    losses = [torch.zeros(()) for _ in range(drafter.num_heads)]
    learnt, masked = [0] * drafter.num_heads, [0] * drafter.num_heads
    for row in rows:
        alone = pack_rows([row])
        features = drafter.features(alone.hidden, alone.positions, alone.mask)[0]
        teacher = torch.softmax(base.logits(row.hidden), -1)[:, ids]
        for t in range(len(row.token_ids) - 2):
            lost = False
            for head in range(drafter.num_heads):
                at = t + 2 + head
                if at >= len(row.token_ids) or at < row.prompt_tokens:
                    continue
                masked[head] += lost
                if lost:
                    continue
                learnt[head] += 1
                logits = drafter.draft_logits(drafter.head_hidden(head, features[t], drafter.embed(row.token_ids[t + 1:at])))
                place = (ids == row.token_ids[at]).nonzero().flatten()
                target: Target = DataTarget(place if len(place) else torch.tensor([-1]))
                if config.loss != "data":
                    target = TeacherTarget(teacher, torch.tensor([at - 1]), config.loss, config.hybrid_decay)  # type: ignore[arg-type]
                losses[head] = losses[head] + reference_loss(logits[None], target)
                lost = not len(place) or int(logits.argmax()) != int(place)
    return losses, learnt, masked


@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
@pytest.mark.parametrize("loss", ["data", "teacher", "acceptance", "hybrid"])
def test_masking_equals_the_loop(tiny_base: Base, kind: str, loss: str) -> None:
    """Values and gradients, of heads that have learned enough to be right sometimes."""
    model, rows = make(tiny_base, kind, loss="data")
    learn(model, rows, 30)
    trained = model.drafter.state_dict()
    model, _ = make(tiny_base, kind, loss=loss, mask_lost=True, head_decay=0.7)
    model.drafter.load_state_dict(trained)
    divisors = torch.tensor([3.0, 5.0, 7.0, 11.0])
    mean, sums = model(pack_rows(rows, 20), divisors)
    wanted, learnt, masked = by_hand(tiny_base, model.drafter, rows)
    assert sums.tolist() == pytest.approx([value.item() for value in wanted], rel=1e-4)
    assert masked[0] == 0 and all(masked[1:]) and all(learnt)
    weights = 0.7 ** torch.arange(4)
    weighted = (torch.stack(wanted) / divisors * weights).sum() / weights.sum()
    torch.testing.assert_close(mean, weighted, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    for got, right in zip(torch.autograd.grad(mean, parameters), torch.autograd.grad(weighted, parameters), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 4])
def test_where_the_first_head_is_always_wrong(tiny_base: Base, prompt: int) -> None:
    """Later heads learn only where the first one is skipped, since its target lies in the prompt: one more position per head and
    row, if the prompt is long enough. Every parameter gets a gradient all the same."""
    model, rows = make(tiny_base, "hydra++", mask_lost=True)
    model.index_of = torch.full_like(model.index_of, -1)
    rows = [FeatureRow(row.token_ids, prompt, row.hidden) for row in rows]
    loss, sums = model(pack_rows(rows, 20), torch.ones(4))
    loss.backward()
    assert (sums > 0).tolist() == ([True] + [False] * 3 if prompt == 1 else [True, True, True, False])
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_equal_weights_are_the_plain_mean(tiny_base: Base) -> None:
    model, rows = make(tiny_base, "hydra")
    loss, sums = model(pack_rows(rows), torch.ones(4))
    assert loss.item() == pytest.approx(float(sums.mean()), rel=1e-6)
    half, rows = make(tiny_base, "hydra", head_decay=0.5)
    loss, sums = half(pack_rows(rows), torch.ones(4))
    assert loss.item() == pytest.approx(float((sums * torch.tensor([8, 4, 2, 1]) / 15).sum()), rel=1e-5)


@pytest.mark.parametrize("name", FIELDS)
def test_every_choice_learns(tiny_base: Base, name: str) -> None:
    model, rows = make(tiny_base, "hydra++", **FIELDS[name])
    curve = learn(model.train(), rows, 25)
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    counts, _ = model.eval().evaluate(pack_rows(rows, 20))
    assert torch.isfinite(counts.loss).all() and (counts.counted > 0).all()
