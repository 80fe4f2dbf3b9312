"""Training targets and their losses: plain ones to read, and a chunked one to run.

Both are cross-entropies over the draft vocabulary. Data: against the token itself; a target outside the draft
vocabulary is ignored and counted. Teacher: against the base's probabilities over the FULL vocabulary, gathered on the
draft vocabulary and not renormalised: a position whose mass lies outside weighs less instead of being stretched.

Why chunked: at 49k or 128k vocabularies the logits of all positions and heads do not fit, and on a CPU they do not fit
the cache. The vocabulary rows are frozen, so each chunk's gradient with respect to the head's output is all that has to
be kept; it is made in the forward pass while the chunk's logits are at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Project = Callable[[Tensor], Tensor]
CHUNK = 128  # rows: a chunk of logits stays in a core's share of the cache


@dataclass(frozen=True)
class DataTarget:
    """Index in the draft vocabulary of the next token, [n] int64; -1 where the token cannot be drafted."""

    index: Tensor

    def part(self, start: int, stop: int) -> DataTarget:
        return DataTarget(self.index[start:stop])

    @property
    def valid(self) -> Tensor:
        """Positions that count, as a scalar int64 tensor."""
        return (self.index >= 0).sum()


@dataclass(frozen=True)
class TeacherTarget:
    """Rows of a shared table of the base's probabilities: table [M, Vd] float, rows [n] int64."""

    table: Tensor
    rows: Tensor

    def part(self, start: int, stop: int) -> TeacherTarget:
        return TeacherTarget(self.table, self.rows[start:stop])

    @property
    def valid(self) -> Tensor:
        """Positions that count, as a scalar int64 tensor: all of them."""
        return torch.tensor(self.rows.shape[0], device=self.rows.device)


Target = DataTarget | TeacherTarget


def reference_loss(logits: Tensor, target: Target) -> Tensor:
    """Sum over positions of the cross-entropy of logits [n, Vd] float32, written as the formula reads."""
    log_q = F.log_softmax(logits, dim=-1)
    if isinstance(target, DataTarget):
        return F.nll_loss(log_q, target.index, ignore_index=-1, reduction="sum")
    return -(target.table[target.rows].to(log_q.dtype) * log_q).sum()


def chunked_loss(hidden: Tensor, project: Project, target: Target, chunk: int = CHUNK) -> Tensor:
    """The same sum for logits = project(hidden), hidden [n, D], never holding more than [chunk, Vd] of them.

    `project` must have no trainable parameters: gradients reach `hidden` alone.
    """
    loss: Tensor = _ChunkedLoss.apply(hidden, project, target, chunk)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, project: Project, target: Target, chunk: int) -> Tensor:  # type: ignore[override]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, hidden.shape[0], chunk):
            stop = min(start + chunk, hidden.shape[0])
            part = hidden[start:stop].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = project(part)
            loss, slope = _value_and_slope(logits.detach(), target.part(start, stop), wanted)
            total += loss
            if gradient is not None:
                gradient[start:stop] = torch.autograd.grad(logits, part, slope)[0]
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * outer.to(gradient.dtype)), None, None, None


def _value_and_slope(logits: Tensor, target: Target, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss (float64 scalar) and its derivative by logits [n, Vd]: mass * softmax - probabilities."""
    log_q = torch.log_softmax(logits, dim=-1)
    if isinstance(target, DataTarget):
        mask = target.index >= 0
        index = target.index.clamp(min=0)[:, None]
        loss = -torch.where(mask, log_q.gather(1, index)[:, 0], 0.0).double().sum()
        if not wanted:
            return loss, None
        weight = mask.to(logits.dtype)[:, None]
        return loss, log_q.exp_().mul_(weight).scatter_add_(1, index, -weight)
    p = target.table[target.rows].to(logits.dtype)
    # vecdot reads both once; (p * log_q).sum() would write an [n, Vd] temporary.
    loss = -torch.linalg.vecdot(p, log_q).double().sum()
    return loss, log_q.exp_().mul_(p.sum(dim=-1, keepdim=True)).sub_(p) if wanted else None


def log_normalisers(hidden: Tensor, vocabulary_logits: Project, chunk: int = CHUNK) -> Tensor:
    """Log of the base's softmax denominator over its FULL vocabulary at hidden [M, D]: [M] float32.

    Four bytes a token that cost a whole vocabulary projection: worth keeping when rows are seen more than once.
    """
    found = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for start in range(0, hidden.shape[0], chunk):
            logits = vocabulary_logits(hidden[start:start + chunk])
            # log_softmax is one fused pass where logsumexp writes temporaries of the whole chunk: 1.2 times as fast.
            found[start:start + chunk] = logits[:, 0] - torch.log_softmax(logits, dim=-1)[:, 0]
    return found


def teacher_probabilities(hidden: Tensor, draft_logits: Project, normalisers: Tensor, chunk: int = CHUNK) -> Tensor:
    """The base's probabilities at hidden [M, D] for the draft vocabulary: [M, Vd] float32, rows sum to at most 1.

    `draft_logits`: the base's own head restricted to the draft vocabulary; `normalisers`: [M] from `log_normalisers`.
    """
    parts = []
    with torch.no_grad():
        for start in range(0, hidden.shape[0], chunk):
            logits = draft_logits(hidden[start:start + chunk])
            parts.append(logits.sub_(normalisers[start:start + chunk, None]).exp_())
    return torch.cat(parts) if parts else draft_logits(hidden)
