"""The session of each drafter, put together in one place."""

from __future__ import annotations

import torch

from hydra_core.base.graphs import recorder_for
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.proposers.base import HeadProposer, PlainProposer, Proposer
from hydra_core.proposers.dynamic import DynamicTreeProposer, most_nodes
from hydra_core.tree.topology import TreeSet


def open_proposer(drafter: Drafter | None, trees: TreeSet, rows: int, slots: int, shared_noise: bool = True,
                 device: torch.device | str = "cpu", graphs: bool | None = None, ragged: bool = False) -> Proposer:
    """The session of a drafter for `rows` rows of at most `slots` tokens; `device`, `ragged`: the base's; `graphs`: as of
    `Engine`."""
    if drafter is None:
        return PlainProposer()
    if isinstance(drafter, HeadDrafter):
        return HeadProposer(drafter, trees, rows, slots, shared_noise, recorder_for(torch.device(device), graphs))
    return DynamicTreeProposer(_adaptive(drafter), rows, slots, shared_noise, device, ragged)


def lookahead_slots(drafter: Drafter | None, trees: TreeSet) -> int:
    """Slots of a row beyond its committed tokens that a draft may fill."""
    if drafter is None or isinstance(drafter, HeadDrafter):
        return max(trees.max_nodes, trees.max_depth + 1)
    return most_nodes(_adaptive(drafter))


def _adaptive(drafter: NgramDrafter | AdaptiveDrafter) -> AdaptiveDrafter:
    return AdaptiveDrafter(ngram=drafter) if isinstance(drafter, NgramDrafter) else drafter
