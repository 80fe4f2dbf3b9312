"""Memory that a step of one sequence reads: the heads' bytes and time beside the base's.

Such a step takes about as long as reading the weights does.
"""

from __future__ import annotations

from dataclasses import dataclass

from hydra_core.base import Base
from hydra_core.base.fused import FusedDecoder
from hydra_core.heads import HeadDrafter
from hydra_core.tree.costs import StepCosts


@dataclass(frozen=True)
class Reads:
    """Bytes and seconds of a plain step of one sequence, and of drafting for it with the first `depth` heads."""

    depth: int
    base_bytes: int
    base_seconds: float
    draft_bytes: int
    draft_seconds: float

    def figures(self) -> dict[str, float]:
        """Megabytes, gigabytes a second, and drafting as a share of a plain step."""
        return {"depth": self.depth, "base_mb": round(self.base_bytes / 1e6, 3),
                "base_gb_per_s": round(self.base_bytes / self.base_seconds / 1e9, 2),
                "draft_mb": round(self.draft_bytes / 1e6, 3),
                "draft_gb_per_s": round(self.draft_bytes / self.draft_seconds / 1e9, 2),
                "bytes_share": round(self.draft_bytes / self.base_bytes, 4),
                "seconds_share": round(self.draft_seconds / self.base_seconds, 4)}

    def sentence(self) -> str:
        """The figures as one sentence."""
        figures = self.figures()
        return (f"drafting with {self.depth} heads reads {figures['draft_mb']:.1f} MB, {figures['draft_gb_per_s']} GB/s; "
                f"a plain step {figures['base_mb']:.1f} MB, {figures['base_gb_per_s']} GB/s: {figures['bytes_share']:.0%} of its "
                f"bytes, {figures['seconds_share']:.0%} of its time")


def reads_of(base: Base, heads: HeadDrafter, costs: StepCosts) -> Reads | None:
    """Compute `Reads` from the sizes of the weights and from measured times.

    None where the base runs through transformers, whose weight layouts are not known here, and where `costs` has no times for
    one sequence or for drafting.
    """
    depth = max(costs.draft.get(1, {0: 0.0}))
    if not isinstance(base.decoder, FusedDecoder) or 1 not in costs.verify or not depth:
        return None
    head = base.vocabulary.head
    last = head.packed.bytes_read if head.packed is not None else head.weight.nbytes
    return Reads(depth, base.decoder.bytes_read + last, costs.verify_seconds(1, 1), heads.bytes_read(depth),
                 costs.draft_seconds(1, depth))
