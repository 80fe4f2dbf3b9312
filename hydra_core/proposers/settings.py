"""Heads and copied text together, each where it pays."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra_core.heads.base import HeadDrafter
from hydra_core.proposers.ngram import NgramDrafter
from hydra_core.tree.costs import StepCosts, unmeasured_costs


@dataclass(frozen=True)
class AdaptiveDrafter:
    """Trees grown at every step, from `heads`, from the text (`ngram`), from both or not at all, by expected gain.

    `costs`: what steps take on this machine; a rough guess when not given.
    """

    heads: HeadDrafter | None = None
    ngram: NgramDrafter | None = field(default_factory=NgramDrafter)
    costs: StepCosts = field(default_factory=unmeasured_costs)


Drafter = HeadDrafter | NgramDrafter | AdaptiveDrafter
