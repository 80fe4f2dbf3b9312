"""Training targets and their losses: the formulas as a reference, and a chunked implementation that is used.

p: the base's probabilities over its FULL vocabulary, gathered on the draft vocabulary and not renormalised, so that a
position whose mass lies outside has less weight instead of being rescaled; q: the head's, which sum to 1 there.

    data        -log q of the token itself; a target outside the draft vocabulary is ignored, and counted as such
    teacher     C = -sum_v p_v log q_v, the forward KL divergence up to a constant
    acceptance  -log a, a = sum_v min(p_v, q_v): the chance that sampling with rejection accepts a token drawn from q
    hybrid      s C + (1 - s)(1 - a), s = exp(-decay a) without gradient: C while they are far apart, then the overlap

The last two are the LK losses of arXiv 2602.23881, where the mass outside adds nothing to a either. Two things differ in
hybrid. The paper uses one s for all positions of a head in a batch, from their mean overlap; here each position has its own,
so the loss does not depend on the rest of the batch or on the rank. And C is not renormalised. Where p_v = q_v exactly, half
of the gradient of min goes to each, as in autograd.

Why chunked: with vocabularies of 49k or 128k tokens the logits of all positions and heads do not fit the memory, and on a CPU
not the cache. The vocabulary rows are frozen, so only each chunk's gradient with respect to the head's output must be kept;
it is computed in the forward pass, while the chunk's logits exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Project = Callable[[Tensor], Tensor]
CHUNK = {"cpu": 128, "cuda": 1024}
"""Rows per chunk, by device: on a CPU the logits fit a core's share of the cache; on a GPU they keep it busy, and with a
vocabulary of 150,000 tokens they take 0.6 GB."""


def rows_at_once(tensor: Tensor) -> int:
    """Rows per chunk on the device of `tensor`."""
    return CHUNK.get(tensor.device.type, CHUNK["cuda"])


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
    """The base's probabilities: `rows` [n] int64 of a shared `table` [M, Vd] float, and the `loss` computed from them; `decay`
    is used by hybrid alone."""

    table: Tensor
    rows: Tensor
    loss: Literal["teacher", "acceptance", "hybrid"] = "teacher"
    decay: float = 3.0

    def part(self, start: int, stop: int) -> TeacherTarget:
        return replace(self, rows=self.rows[start:stop])

    @property
    def valid(self) -> Tensor:
        """Positions that count, as a scalar int64 tensor: all of them."""
        return torch.tensor(self.rows.shape[0], device=self.rows.device)


Target = DataTarget | TeacherTarget


def reference_loss(logits: Tensor, target: Target) -> Tensor:
    """Sum over positions of the loss of logits [n, Vd], float32 or float64, written as in the formula."""
    log_q = F.log_softmax(logits, dim=-1)
    if isinstance(target, DataTarget):
        return F.nll_loss(log_q, target.index, ignore_index=-1, reduction="sum")
    p = target.table[target.rows].to(log_q.dtype)
    crossed = -(p * log_q).sum(dim=-1)
    if target.loss == "teacher":
        return crossed.sum()
    overlap = torch.minimum(p, log_q.exp()).sum(dim=-1)
    if target.loss == "acceptance":
        return -overlap.clamp_min(torch.finfo(overlap.dtype).tiny).log().sum()
    share = torch.exp(-target.decay * overlap.detach())
    return (share * crossed + (1 - share) * (1 - overlap)).sum()


def chunked_loss(hidden: Tensor, project: Project, target: Target, chunk: int | None = None) -> Tensor:
    """The same sum for logits = project(hidden), hidden [n, D], with at most [chunk, Vd] logits in memory.

    `project` must have no trainable parameters: gradients reach `hidden` alone.
    """
    loss: Tensor = _ChunkedLoss.apply(hidden, project, target, chunk or rows_at_once(hidden), False)[0]  # type: ignore[no-untyped-call]
    return loss


def chunked_loss_and_best(hidden: Tensor, project: Project, target: Target, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """`chunked_loss`, and the argmax draft token of each position: indices in the draft vocabulary [n] int64."""
    loss, best = _ChunkedLoss.apply(hidden, project, target, chunk or rows_at_once(hidden), True)  # type: ignore[no-untyped-call]
    return loss, best


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, project: Project, target: Target, chunk: int,
                ranked: bool) -> tuple[Tensor, Tensor]:
        best = torch.empty(hidden.shape[0] if ranked else 0, dtype=torch.int64, device=hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, hidden.shape[0], chunk):
            stop = min(start + chunk, hidden.shape[0])
            part = hidden[start:stop].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                logits = project(part)
            if ranked:
                best[start:stop] = logits.detach().argmax(dim=-1)
            loss, slope = _value_and_slope(logits.detach(), target.part(start, stop), wanted)
            total += loss
            if gradient is not None:
                gradient[start:stop] = torch.autograd.grad(logits, part, slope)[0]
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(best)
        return (total if hidden.dtype == torch.float64 else total.float()), best

    @staticmethod
    def backward(ctx: Any, outer: Tensor, _: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * outer.to(gradient.dtype)), None, None, None, None


def _value_and_slope(logits: Tensor, target: Target, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Summed loss (float64 scalar) and its derivative by logits [n, Vd]; for a cross-entropy that is mass * q - p."""
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
    crossed = None if target.loss == "acceptance" else -torch.linalg.vecdot(p, log_q)
    if target.loss != "teacher":
        return _overlap_value_and_slope(p, log_q.exp_(), crossed, target.decay, wanted)
    assert crossed is not None
    return crossed.double().sum(), log_q.exp_().mul_(p.sum(dim=-1, keepdim=True)).sub_(p) if wanted else None


def _overlap_value_and_slope(p: Tensor, q: Tensor, crossed: Tensor | None, decay: float,
                             wanted: bool) -> tuple[Tensor, Tensor | None]:
    """`_value_and_slope` of `acceptance`, or of `hybrid` with the cross-entropies `crossed` [n]; overwrites p and q [n, Vd].

    Only entries where q is the smaller move the overlap a: with m = 1 there, da/dz_j = q_j (m_j - sum_v m_v q_v). No entry
    of it is larger than a, so the slope of -log a is at most 1 however small a is.
    """
    overlap = torch.minimum(p, q).sum(dim=-1)
    safe = overlap.clamp_min(torch.finfo(overlap.dtype).tiny)
    share = None if crossed is None else torch.exp(-decay * overlap)
    if share is None or crossed is None:
        loss = -safe.log().double().sum()
    else:
        loss = (share * crossed + (1 - share) * (1 - overlap)).double().sum()
    if not wanted:
        return loss, None
    slope = (p - q).sign_().add_(1).mul_(0.5)  # m: a half where they are equal
    slope.sub_(torch.linalg.vecdot(slope, q)[:, None]).mul_(q)
    if share is None:
        return loss, slope.div_(-safe[:, None])
    slope.mul_((share - 1)[:, None])
    return loss, slope.add_(q.mul_((share * p.sum(dim=-1))[:, None])).sub_(p.mul_(share[:, None]))


def log_partition(hidden: Tensor, vocabulary_logits: Project, chunk: int | None = None) -> Tensor:
    """Log of the base's softmax denominator over its FULL vocabulary at hidden [M, D]: [M] float32.

    Four bytes per token that cost a projection to the whole vocabulary: they are stored when rows are read more than once.
    """
    found, chunk = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device), chunk or rows_at_once(hidden)
    with torch.no_grad():
        for start in range(0, hidden.shape[0], chunk):
            logits = vocabulary_logits(hidden[start:start + chunk])
            # log_softmax is one fused pass where logsumexp writes temporaries of the whole chunk: 1.2 times as fast.
            found[start:start + chunk] = logits[:, 0] - torch.log_softmax(logits, dim=-1)[:, 0]
    return found


def teacher_probabilities(hidden: Tensor, draft_logits: Project, log_partitions: Tensor, chunk: int | None = None) -> Tensor:
    """The base's probabilities at hidden [M, D] for the draft vocabulary: [M, Vd] float32, rows sum to at most 1.

    `draft_logits`: the base's own head restricted to the draft vocabulary; `log_partitions`: [M] from `log_partition`.
    """
    parts, chunk = [], chunk or rows_at_once(hidden)
    with torch.no_grad():
        for start in range(0, hidden.shape[0], chunk):
            logits = draft_logits(hidden[start:start + chunk])
            parts.append(logits.sub_(log_partitions[start:start + chunk, None]).exp_())
    return torch.cat(parts) if parts else draft_logits(hidden)
