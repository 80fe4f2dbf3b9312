"""What may be given to the engine as a drafter, and the settings of a dynamic tree."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra_core.heads.base import HeadDrafter
from hydra_core.proposers.draft_model import DraftModel
from hydra_core.proposers.ngram import NgramDrafter
from hydra_core.proposers.suffix import SuffixDrafter
from hydra_core.tree.costs import StepCosts, unmeasured_costs


@dataclass(frozen=True)
class AdaptiveDrafter:
    """A dynamic tree at every step: from `heads`, from copied text (`ngram`), from earlier answers (`suffix`), from all or from
    none of them, whatever is expected to make the most tokens per second.

    `costs`: how long steps take on this machine; a rough guess by default.
    """

    heads: HeadDrafter | None = None
    ngram: NgramDrafter | None = field(default_factory=NgramDrafter)
    costs: StepCosts = field(default_factory=unmeasured_costs)
    suffix: SuffixDrafter | None = None


Drafter = HeadDrafter | NgramDrafter | AdaptiveDrafter | DraftModel
