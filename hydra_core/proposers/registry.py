"""The one place that makes the proposer of each drafter."""

from __future__ import annotations

import torch

from hydra_core.base.graphs import recorder_for
from hydra_core.heads import HeadDrafter
from hydra_core.proposers.base import Proposer
from hydra_core.proposers.dynamic import DynamicTreeProposer, most_nodes
from hydra_core.proposers.heads import HeadProposer
from hydra_core.proposers.ngram import NgramDrafter
from hydra_core.proposers.plain import PlainProposer
from hydra_core.proposers.settings import AdaptiveDrafter, Drafter
from hydra_core.proposers.suffix_index import SuffixIndex
from hydra_core.tree.draft_tree import TreeSet


def open_proposer(drafter: Drafter | None, trees: TreeSet, rows: int, slots: int, shared_noise: bool = True,
                  device: torch.device | str = "cpu", graphs: bool | None = None, ragged: bool = False,
                  answers: SuffixIndex | None = None) -> Proposer:
    """The proposer of `drafter` for a KV cache of `rows` rows and `slots` slots each.

    `trees`: the fixed trees, used by heads alone; `device`, `ragged`: the base's; `shared_noise`, `graphs`: see `Engine`;
    `answers`: where finished answers are kept, for a drafter that looks into them.
    """
    if drafter is None:
        return PlainProposer()
    if isinstance(drafter, HeadDrafter):
        return HeadProposer(drafter, trees, rows, slots, shared_noise, recorder_for(torch.device(device), graphs))
    return DynamicTreeProposer(_adaptive(drafter), rows, slots, shared_noise, device, ragged, answers)


def lookahead_slots(drafter: Drafter | None, trees: TreeSet) -> int:
    """Slots of a row beyond its committed tokens that a draft may fill."""
    if drafter is None or isinstance(drafter, HeadDrafter):
        return max(trees.max_nodes, trees.max_depth + 1)
    return most_nodes(_adaptive(drafter))


def answers_kept(drafter: Drafter | None) -> int:
    """Tokens of finished answers that `drafter` wants to be kept for it, 0: none."""
    return drafter.suffix.max_tokens if isinstance(drafter, AdaptiveDrafter) and drafter.suffix else 0


def _adaptive(drafter: NgramDrafter | AdaptiveDrafter) -> AdaptiveDrafter:
    return AdaptiveDrafter(ngram=drafter) if isinstance(drafter, NgramDrafter) else drafter
