"""What an engine holds, by the estimates that check it before it allocates."""

from __future__ import annotations

from hydra_core.decoding.memory import cache_bytes, workspace_bytes
from hydra_core.proposers.dynamic import MOST_NODES
from hydra_core.proposers.dynamic_kind import INDEXED_NGRAM_BYTES, INDEXED_SUFFIX_BYTES
from pipelines.config import NgramSection
from pipelines.sizing.amounts import Range
from pipelines.sizing.base import BaseShape
from pipelines.sizing.heads import HeadsShape

GATHERED = 1.15
"""Of the weights, what loading keeps in memory besides, at most."""


def engine_parts(base: BaseShape, heads: HeadsShape | None, rows: int, tokens: int, slots: int = 0,
                 kept: int = 0) -> dict[str, Range]:
    """Bytes of an engine for `rows` sequences of `tokens` tokens, without the base's weights: keys and values, a step, heads.

    `slots`: room for draft nodes that every sequence gets at least; with heads it is that of the largest tree or more; `kept`:
    tokens of finished sequences that are kept.
    """
    nodes = MOST_NODES if heads else 1
    planned, drafter, wide = base.planned(), heads.drafter if heads else None, tokens + max(nodes, slots)
    parts = {"keys and values": Range.of(cache_bytes(planned, drafter, rows, wide, kept)),
             "a step": Range(0, workspace_bytes(planned, rows, wide, nodes))}
    if heads:
        parts["heads"] = Range(heads.weight_bytes(base.item), 1.5 * heads.weight_bytes(base.item))  # with a 4-bit copy of some
    return parts


def ngram_bytes(ngram: NgramSection, rows: int, slots: int) -> Range:
    """Memory of the n-gram indexes of `rows` texts of up to `slots` tokens."""
    return Range(0, rows * slots * (ngram.max_match - ngram.min_match + 1) * INDEXED_NGRAM_BYTES)


def answers_bytes(shared: int, rows: int, slots: int) -> Range:
    """Memory of `shared` tokens of finished answers, 0: they are not kept, and of the indexes of `rows` texts beside them."""
    return Range(0, (shared + rows * slots) * INDEXED_SUFFIX_BYTES if shared else 0)


def weights_on(base: BaseShape, gpu: bool) -> dict[str, Range]:
    """Bytes of the base's weights where it runs; on a CPU the vocabulary projection may be there in a packed copy too."""
    packed = 0 if gpu or base.item != 2 else base.vocab_size * base.width * base.item
    return {"weights": Range(base.weight_bytes(), base.weight_bytes() + packed)}


def loading(base: BaseShape) -> dict[str, Range]:
    """Memory of the machine that loading a base to a GPU takes for a while."""
    return {"weights while they are loaded": Range(base.weight_bytes(), GATHERED * base.weight_bytes())}
