"""The table of the kinds of drafters: the one place that knows what may draft."""

from __future__ import annotations

from types import NoneType
from typing import Any

from hydra_core.heads import HeadDrafter
from hydra_core.heads.eagle import Eagle
from hydra_core.proposers.base import Proposer
from hydra_core.proposers.draft_model import DraftModel, DraftModelKind
from hydra_core.proposers.drafter import Context, DrafterKind
from hydra_core.proposers.dynamic_kind import CopyingKind, DynamicKind
from hydra_core.proposers.eagle import EagleKind
from hydra_core.proposers.heads import HeadKind
from hydra_core.proposers.ngram import NgramDrafter
from hydra_core.proposers.plain import PlainKind
from hydra_core.proposers.settings import AdaptiveDrafter, Drafter
from hydra_core.tree.draft_tree import TreeSet

KINDS: dict[type, type[DrafterKind]] = {
    NoneType: PlainKind,
    HeadDrafter: HeadKind,
    Eagle: EagleKind,
    NgramDrafter: CopyingKind,
    AdaptiveDrafter: DynamicKind,
    DraftModel: DraftModelKind,
}
"""Class of a drafter -> what the engine asks of it. A kind is a file beside this one and a line here."""


def kind_of(drafter: Drafter | None) -> DrafterKind:
    """What the engine asks of `drafter`. Raises TypeError for an object that is no drafter."""
    for cls in type(drafter).__mro__:
        if cls in KINDS:
            return KINDS[cls](drafter)
    raise TypeError(f"{type(drafter).__name__} is not a drafter")


def open_proposer(drafter: Drafter | None, trees: TreeSet, rows: int, slots: int, **context: Any) -> Proposer:
    """The proposer of `drafter` for a KV cache of `rows` rows and `slots` slots each; `context`: other fields of `Context`."""
    return kind_of(drafter).open(Context(rows, slots, trees, **context))


def lookahead_slots(drafter: Drafter | None, trees: TreeSet) -> int:
    """Slots of a row beyond its committed tokens that a draft may fill."""
    return kind_of(drafter).draft_slots(trees)
