"""Dynamic trees and copied text as kinds of drafters."""

from __future__ import annotations

from dataclasses import replace

from hydra_core.base.model import Base
from hydra_core.errors import InputError
from hydra_core.heads.base import HeadDrafter
from hydra_core.proposers.base import Proposer
from hydra_core.proposers.drafter import Context, DrafterKind
from hydra_core.proposers.dynamic import DynamicTreeProposer, most_nodes
from hydra_core.proposers.head_features import feature_bytes, kept_feature_bytes
from hydra_core.proposers.ngram import NgramDrafter
from hydra_core.proposers.settings import AdaptiveDrafter
from hydra_core.proposers.suffix import SuffixDrafter
from hydra_core.tree.draft_tree import TreeSet

INDEXED_NGRAM_BYTES = 900
"""What an index keeps for an n-gram that it sees for the first time."""
INDEXED_SUFFIX_BYTES = 300
"""What a `SuffixIndex` keeps for a token after which all of its n-grams are new."""


class DynamicKind(DrafterKind):
    """An `AdaptiveDrafter`."""

    drafter: AdaptiveDrafter

    @property
    def heads(self) -> HeadDrafter | None:
        return self.drafter.heads

    def check(self, base: Base) -> None:
        """Raise InputError for heads that are no heads by depth, of which these trees are made."""
        heads = self.drafter.heads
        if heads is not None and heads.config.autoregressive:
            raise InputError(f"{heads.config.kind} heads grow trees of their own: give them to the engine alone, without copied "
                             "text")

    def draft_slots(self, trees: TreeSet) -> int:
        return most_nodes(self.drafter)

    def device_bytes(self, rows: int, slots: int) -> int:
        return 0 if self.drafter.heads is None else feature_bytes(self.drafter.heads, rows, slots)

    def kept_bytes(self, tokens: int) -> int:
        return 0 if self.drafter.heads is None else kept_feature_bytes(self.drafter.heads, tokens)

    def host_bytes(self, rows: int, slots: int) -> int:
        """Of indexes of texts in which no n-gram repeats itself, and of the finished answers that are kept."""
        ngram, suffix = self.drafter.ngram, self.drafter.suffix
        found = (rows * slots + suffix.max_tokens) * INDEXED_SUFFIX_BYTES if suffix else 0
        if ngram is not None:
            found += rows * slots * (ngram.max_match - ngram.min_match + 1) * INDEXED_NGRAM_BYTES
        return found

    @property
    def answers_kept(self) -> int:
        return self.drafter.suffix.max_tokens if self.drafter.suffix else 0

    def sharing_answers(self, tokens: int) -> AdaptiveDrafter:
        return replace(self.drafter, suffix=SuffixDrafter(max_tokens=tokens))

    def open(self, context: Context) -> Proposer:
        return DynamicTreeProposer(self.drafter, context.rows, context.slots, context.shared_noise, context.device,
                                   context.ragged, context.answers)


class CopyingKind(DynamicKind):
    """An `NgramDrafter`: a dynamic tree of copied text alone."""

    def __init__(self, drafter: NgramDrafter) -> None:
        super().__init__(AdaptiveDrafter(ngram=drafter))
