"""A drafter in training: the loss of a packed batch, and metrics on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hydra_core.base.taps import last_of
from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.heads import HeadDrafter
from hydra_core.training.alignment import HeadSlice, head_slice, teacher_positions
from hydra_core.training.losses import (
    DataTarget,
    Target,
    TeacherTarget,
    chunked_loss,
    chunked_loss_and_best,
    log_partition,
    reference_loss,
    teacher_probabilities,
)
from hydra_core.training.metrics import TOP, HeadCounts
from hydra_core.training.packing import Packed
from hydra_core.training.ranks import head_outputs, rank_tuples
from hydra_core.tree.simulation import RankRows


@dataclass(frozen=True)
class TeacherTable:
    """The base's probabilities for the whole batch: `table` [M, Vd] float32; `row_of` [n] int64, the row of each flat token, -1
    for none."""

    table: Tensor
    row_of: Tensor


class HeadTraining(nn.Module):
    """Wraps a drafter so that one call is one batch; its parameters are the drafter's.

    `plain`: the reference losses, to compare with: the base's softmax is computed again for every head, and all logits are
    kept. Raises ValueError for heads with vocabulary rows of their own, to which these losses bring no gradient.
    """

    def __init__(self, drafter: HeadDrafter, vocabulary: BaseVocabulary, plain: bool = False) -> None:
        super().__init__()
        if drafter.config.own_rows:
            raise ValueError("heads with vocabulary rows of their own (own_rows) are not trained")
        self.drafter = drafter
        self.vocabulary = vocabulary
        self.plain = plain
        self.index_of = drafter.draft_vocab.index_of.to(vocabulary.embedding.device)
        decays = drafter.config.head_decay ** torch.arange(drafter.num_heads, dtype=torch.float64)
        self.head_weights = decays / decays.mean()  # [K], 1 in the mean

    def forward(self, packed: Packed, divisors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over heads of (summed loss / divisors[i]), and the summed losses [K] float64 without gradient.

        `divisors`: [K] positive; from the counts of the whole step, so that the distribution of rows over ranks makes no
        difference. With `head_decay` the mean is weighted. With `mask_lost` a head's sum is over the positions t where every
        head before it has its target as argmax, given the true tokens as path: where greedy decoding would still accept the
        draft. Masked positions add nothing and are not computed; divisors still count them, so a later head has less weight
        the less often it is reached. Targets outside the draft vocabulary count as missed; a head whose target would lie in
        the prompt is skipped and masks nothing.
        """
        outputs = head_outputs(self.drafter, packed)
        tokens = packed.token_ids.flatten()
        teacher = None if self.plain else self._teacher(packed)
        masking = self.drafter.config.mask_lost and not self.plain
        alive = torch.ones_like(tokens, dtype=torch.bool)
        losses = []
        for head in range(self.drafter.num_heads):
            part = head_slice(head, packed.spans)
            if masking:
                part = part.only(alive[part.features])
            hidden = outputs(head, part.features, part.path)
            if self.plain:
                losses.append(self._plain_loss(hidden, part, tokens, packed))
                continue
            target = self._target(part, tokens, teacher)
            if masking:
                loss, best = chunked_loss_and_best(hidden, self.drafter.draft_logits, target)
                alive[part.features] = best == self.index_of[tokens[part.target]]
            else:
                loss = chunked_loss(hidden, self.drafter.draft_logits, target)
            losses.append(loss)
        stacked = torch.stack(losses)
        return (stacked / divisors * self.head_weights.to(stacked)).mean(), stacked.detach().double()

    @torch.no_grad()
    def evaluate(self, packed: Packed) -> tuple[HeadCounts, RankRows]:
        """Loss counts, hits and rank tuples at the positions at which a decoder drafts, without masking."""
        outputs = head_outputs(self.drafter, packed)
        tokens = packed.token_ids.flatten()
        rows = rank_tuples(self.drafter, outputs, self.index_of[tokens], packed.spans)
        teacher = self._teacher(packed)
        counts = HeadCounts.zeros(self.drafter.num_heads)
        loss, hits = counts.loss, counts.hits
        counted, ranked, outside = counts.counted.clone(), counts.ranked.clone(), counts.outside.clone()
        for head in range(self.drafter.num_heads):
            part = head_slice(head, packed.spans, decoding=True)
            hidden = outputs(head, part.features, part.path)
            target = self._target(part, tokens, teacher)
            loss[head] = chunked_loss(hidden, self.drafter.draft_logits, target).double().cpu()
            counted[head], ranked[head] = target.valid.cpu(), part.count
            outside[head] = (self.index_of[tokens[part.target]] < 0).sum().cpu()
            hits[head] = torch.stack([(rows.ranks[:, head] <= top).sum() for top in range(TOP)])
        return HeadCounts(loss, counted, ranked, hits, outside), rows

    def _teacher(self, packed: Packed) -> TeacherTable | None:
        """Computed once per batch instead of once per head, since heads share almost all teacher positions."""
        if not self.drafter.config.reads_teacher:
            return None
        at = teacher_positions(packed.spans)
        hidden = last_of(packed.hidden.flatten(0, 1)[at], self.vocabulary.width)
        stored = packed.log_partitions
        log_partitions = log_partition(hidden, self.vocabulary.head) if stored is None else stored.flatten()[at]
        table = teacher_probabilities(hidden, self.drafter.draft_logits, log_partitions)
        row_of = torch.full((packed.token_ids.numel(),), -1, dtype=torch.int64, device=at.device)
        row_of[at] = torch.arange(len(at), device=at.device)
        return TeacherTable(table, row_of)

    def _plain_loss(self, hidden: Tensor, part: HeadSlice, tokens: Tensor, packed: Packed) -> Tensor:
        config, target = self.drafter.config, self._target(part, tokens, None)
        if config.loss in ("teacher", "acceptance", "hybrid"):
            hidden_states = last_of(packed.hidden.flatten(0, 1)[part.teacher], self.vocabulary.width)
            taught = self.vocabulary.head(hidden_states).softmax(-1)
            table = taught[:, self.drafter.draft_vocab.ids.to(taught.device)]
            target = TeacherTarget(table, torch.arange(len(table), device=table.device), config.loss, config.hybrid_decay)
        return reference_loss(self.drafter.draft_logits(hidden), target)

    def _target(self, part: HeadSlice, tokens: Tensor, teacher: TeacherTable | None) -> Target:
        config = self.drafter.config
        if teacher is None or config.loss not in ("teacher", "acceptance", "hybrid"):
            return DataTarget(self.index_of[tokens[part.target]])
        return TeacherTarget(teacher.table, teacher.row_of[part.teacher], config.loss, config.hybrid_decay)
