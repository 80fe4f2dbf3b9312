"""The session of each drafter, put together in one place."""

from __future__ import annotations

import torch

from hydra_core.base.graphs import recorder_for
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.proposers.base import HeadSession, PlainSession, Session
from hydra_core.proposers.dynamic import AdaptiveSession, most_nodes
from hydra_core.tree.topology import TreeSet


def open_session(drafter: Drafter | None, trees: TreeSet, rows: int, slots: int, shared_noise: bool = True,
                 device: torch.device | str = "cpu", graphs: bool | None = None, packs: bool = False) -> Session:
    """The session of a drafter for `rows` rows of at most `slots` tokens; `device`, `packs`: the base's; `graphs`: as of
    `Engine`."""
    if drafter is None:
        return PlainSession()
    if isinstance(drafter, HeadDrafter):
        return HeadSession(drafter, trees, rows, slots, shared_noise, recorder_for(torch.device(device), graphs))
    return AdaptiveSession(_adaptive(drafter), rows, slots, shared_noise, device, packs)


def spare_slots(drafter: Drafter | None, trees: TreeSet) -> int:
    """Slots of a row beyond its committed tokens that a draft may fill."""
    if drafter is None or isinstance(drafter, HeadDrafter):
        return max(trees.max_nodes, trees.max_depth + 1)
    return most_nodes(_adaptive(drafter))


def _adaptive(drafter: NgramDrafter | AdaptiveDrafter) -> AdaptiveDrafter:
    return AdaptiveDrafter(ngram=drafter) if isinstance(drafter, NgramDrafter) else drafter
