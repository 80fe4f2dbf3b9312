"""The rank at which each head drafts the true next token, for each position."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hydra_core.heads import HeadDrafter
from hydra_core.heads.base import HeadOutputs
from hydra_core.training.alignment import draft_positions, feature_positions
from hydra_core.training.losses import Project, rows_at_once
from hydra_core.training.packing import Packed, Spans
from hydra_core.tree.simulation import MISS, RankRows


def ranks_of(hidden: Tensor, project: Project, index: Tensor, chunk: int | None = None) -> Tensor:
    """Rank of draft-vocabulary entry `index` [n] in the logits of hidden [n, D]; [n] int64, MISS where index is -1.

    Equal logits count by position in the draft vocabulary, so ranks of one row are a permutation.
    """
    ranks, chunk = torch.full_like(index, MISS), chunk or rows_at_once(hidden)
    with torch.no_grad():
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits, wanted = project(hidden[part]), index[part].clamp(min=0)[:, None]
            value = logits.gather(1, wanted)
            earlier = torch.arange(logits.shape[1], device=logits.device) < wanted
            better = (logits > value) | ((logits == value) & earlier)
            ranks[part] = torch.where(index[part] >= 0, better.sum(-1), ranks[part])
    return ranks


def rank_rows(drafter: HeadDrafter, packed: Packed) -> RankRows:
    """Rank tuples of every step that a decoder could take on the packed rows, with the true tokens as path (teacher-forced).

    On an accepted path these are exactly the inputs of decoding, so walking the tuples simulates decoding.
    """
    with torch.no_grad():
        tokens = packed.token_ids.flatten()
        index = drafter.draft_vocab.index_of.to(tokens.device)[tokens]
        return rank_tuples(drafter, head_outputs(drafter, packed), index, packed.spans)


def head_outputs(drafter: HeadDrafter, packed: Packed) -> HeadOutputs:
    """What the heads give at the positions at which they learn or draft."""
    wanted = torch.zeros(packed.token_ids.numel(), dtype=torch.bool, device=packed.token_ids.device)
    wanted[feature_positions(packed.spans, drafter.num_heads)] = True
    return drafter.outputs(packed.token_ids, packed.hidden, packed.positions, packed.mask, wanted.view(packed.token_ids.shape))


def rank_tuples(drafter: HeadDrafter, outputs: HeadOutputs, index: Tensor, spans: Spans) -> RankRows:
    """`rank_rows` from the heads' outputs and the draft index [n] int64 of the flat tokens."""
    at = draft_positions(spans)
    counts = (spans.lengths - spans.prompt_lengths - 1).clamp(min=0)
    end = torch.repeat_interleave(spans.starts + spans.lengths, counts)
    columns = []
    for head in range(drafter.num_heads):
        inside = at + 2 + head < end
        here = at[inside]
        hidden = outputs(head, here, here[:, None] + torch.arange(1, head + 2, device=at.device))
        ranks = torch.full_like(at, MISS)
        ranks[inside] = ranks_of(hidden, partial(drafter.head_logits, head), index[here + 2 + head])
        columns.append(ranks)
    return RankRows(torch.stack(columns, 1).cpu(), tuple(int(count) for count in counts))
