"""What the engine asks of a drafter, whatever it drafts with: `registry.KINDS` has an entry for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hydra_core.proposers.base import Proposer
from hydra_core.proposers.suffix_index import SuffixIndex
from hydra_core.tree.draft_tree import PLAIN, TreeSet

if TYPE_CHECKING:
    from hydra_core.base.model import Base
    from hydra_core.heads.base import HeadDrafter


@dataclass(frozen=True)
class Context:
    """What a proposer is opened on: a KV cache of `rows` rows with `slots` slots each.

    `trees`: of fixed shapes, for a kind that fills them; `device`, `ragged`: the base's; `shared_noise`, `graphs`: see `Engine`;
    `answers`: where finished answers are kept, for a drafter that looks into them; `vocab_size`: the base's, None: the drafter's.
    """

    rows: int
    slots: int
    trees: TreeSet
    shared_noise: bool = True
    device: torch.device | str = "cpu"
    graphs: bool | None = None
    ragged: bool = False
    answers: SuffixIndex | None = None
    vocab_size: int | None = None


class DrafterKind:
    """A drafter (settings or weights) as the engine sees it. Subclasses override what their drafters need.

    `fixed_trees`: every step of a batch size verifies the same tree of `Context.trees`; `heads`: the trained heads that draft,
    None without any.
    """

    fixed_trees = False

    def __init__(self, drafter: Any) -> None:
        self.drafter = drafter

    @property
    def taps(self) -> tuple[int, ...]:
        """Layers of the base whose input the proposer reads behind the hidden states; see `hydra_core.base.taps`."""
        return ()

    @property
    def heads(self) -> HeadDrafter | None:
        return None

    def check(self, base: Base) -> None:
        """Raise InputError for a drafter that does not fit `base`."""

    def trees(self, asked: TreeSet | None) -> TreeSet:
        """The fixed trees that are filled, given the ones that the user asks for. Raises InputError for trees that do not fit."""
        return TreeSet({1: PLAIN})

    def draft_slots(self, trees: TreeSet) -> int:
        """Slots of a row beyond its committed tokens that a draft may fill, its root included."""
        raise NotImplementedError

    def device_bytes(self, rows: int, slots: int) -> int:
        """Bytes that its proposer keeps on the base's device for `rows` rows of `slots` slots, weights left out."""
        return 0

    def kept_bytes(self, tokens: int) -> int:
        """Bytes of the proposer's own keys and values (`Proposer.kv_caches`) of `tokens` tokens."""
        return 0

    def host_bytes(self, rows: int, slots: int) -> int:
        """Rough bytes that its proposer keeps on the host at most, for `rows` texts of `slots` tokens."""
        return 0

    @property
    def answers_kept(self) -> int:
        """Tokens of finished answers that are kept for it, 0: none."""
        return 0

    def sharing_answers(self, tokens: int) -> Any:
        """The drafter that also looks into the latest `tokens` tokens of finished answers, if it can, else itself."""
        return self.drafter

    def open(self, context: Context) -> Proposer:
        """Its state while decoding."""
        raise NotImplementedError
