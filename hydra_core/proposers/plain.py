"""Plain decoding: nothing is drafted and nothing remembered."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hydra_core.base.kv_cache import KVCache
from hydra_core.proposers.base import Accepted, Proposal, Proposer, StepTimes
from hydra_core.proposers.drafter import Context, DrafterKind
from hydra_core.sampling.sampler import Sampler
from hydra_core.tree.batch import chain
from hydra_core.tree.draft_tree import TreeSet


class PlainProposer:
    """Proposes the root alone. Proposers that remember less than the protocol offers inherit the rest from here."""

    max_nodes = 1
    reads_next = False

    @property
    def kv_caches(self) -> tuple[KVCache, ...]:
        """None of its own."""
        return ()

    def catch_up(self, row: int) -> None:
        """Nothing to read."""

    def restored(self, row: int, count: int) -> None:
        """Nothing to note."""

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Nothing to remember."""

    def adopt(self, row: int, prompt_ids: Sequence[int], tokens: Sequence[int]) -> bool:
        """Nothing is needed of its past."""
        self.admit(row, prompt_ids)
        return True

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """Nothing to copy."""

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        """The roots themselves."""
        return Proposal(roots[:, None], chain(1))

    def commit(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor, tokens: Sequence[Sequence[int]] = ()) -> None:
        """Nothing to remember."""

    def feedback(self, accepted: Accepted, times: StepTimes, kept: Sequence[bool] | None = None) -> None:
        """Nothing to learn."""

    def end(self, row: int) -> None:
        """Nothing to keep."""

    def move(self, source: int, target: int) -> None:
        """Nothing to move."""


class PlainKind(DrafterKind):
    """No drafter: every step is a plain one."""

    fixed_trees = True

    def draft_slots(self, trees: TreeSet) -> int:
        return 1

    def open(self, context: Context) -> Proposer:
        return PlainProposer()
