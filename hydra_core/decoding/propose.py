"""Filling a tree with tokens, and what a drafter must remember of each row to do so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hydra_core.base.kv_cache import KVCache
from hydra_core.base.model import PREFILL_CHUNK
from hydra_core.decoding.choose import Chooser, rank_scores
from hydra_core.drafters import HeadDrafter, NgramDrafter, NgramIndex
from hydra_core.drafters.hydra_plus import HydraPlusPlus
from hydra_core.tree.forest import Forest
from hydra_core.tree.topology import Tree, TreeSet, chain


@dataclass(frozen=True)
class Proposal:
    """`tokens`: [B, N] int64, node 0 the root, -1 where nothing was drafted; `forest`: its shape."""

    tokens: Tensor
    forest: Forest


class Session(Protocol):
    """A drafter's memory of the running rows. Rows are 0..B-1 without holes; `move` fills a hole from the end."""

    max_nodes: int

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None: ...

    def observe(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        """Newly committed hidden states [B, M, D], the first `counts` [B] of each row."""
        ...

    def emit(self, row: int, tokens: Sequence[int]) -> None: ...

    def propose(self, roots: Tensor, positions: Sequence[int], choosers: Sequence[Chooser]) -> Proposal:
        """`roots`: [B] tokens; `positions`: [B] where they stand; `choosers`: how each row will choose."""
        ...

    def move(self, source: int, target: int) -> None: ...

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        """Row `target` begins with the first `count` tokens of row `source`."""
        ...


class PlainSession:
    """No drafts: the root alone."""

    max_nodes = 1

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Nothing to remember."""

    def observe(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        """Nothing to remember."""

    def emit(self, row: int, tokens: Sequence[int]) -> None:
        """Nothing to remember."""

    def propose(self, roots: Tensor, positions: Sequence[int], choosers: Sequence[Chooser]) -> Proposal:
        return Proposal(roots[:, None], chain(1))

    def move(self, source: int, target: int) -> None:
        """Nothing to move."""

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        """Nothing to copy."""


class NgramSession(PlainSession):
    """Prompt lookup for every row. The running batch shares one budget of drafted nodes, since their cost adds up."""

    def __init__(self, drafter: NgramDrafter, rows: int) -> None:
        self.drafter = drafter
        self.max_nodes = drafter.length + 1
        self.indexes = [NgramIndex(drafter) for _ in range(rows)]

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        self.indexes[row] = NgramIndex(self.drafter)
        self.indexes[row].extend(prompt_ids)

    def emit(self, row: int, tokens: Sequence[int]) -> None:
        self.indexes[row].extend(tokens)

    def propose(self, roots: Tensor, positions: Sequence[int], choosers: Sequence[Chooser]) -> Proposal:
        length = max(1, self.drafter.length // len(roots))
        drafts = [self.indexes[row].draft(length) for row in range(len(roots))]
        longest = max(map(len, drafts))
        padded = torch.tensor([draft + [-1] * (longest - len(draft)) for draft in drafts], dtype=torch.int64)
        return Proposal(torch.cat((roots[:, None], padded.to(roots.device)), dim=1), chain(longest + 1))

    def move(self, source: int, target: int) -> None:
        self.indexes[target] = self.indexes[source]


class HeadSession(PlainSession):
    """Trained heads: the last committed position's features of every row and, for Hydra++, the prefix layer's cache."""

    def __init__(self, drafter: HeadDrafter, trees: TreeSet, rows: int, slots: int, shared_noise: bool = True) -> None:
        self.drafter, self.trees, self.shared_noise = drafter, trees, shared_noise
        drafter.pack()
        weight = drafter.weight
        self.features = torch.zeros(rows, weight.shape[0], dtype=weight.dtype, device=weight.device)
        self.draft_ids = drafter.draft_vocab.ids.to(weight.device)
        self.max_nodes = trees.max_nodes
        self.prefix = drafter.prefix if isinstance(drafter, HydraPlusPlus) else None
        self.cache: KVCache | None = self.prefix.allocate(rows, slots) if self.prefix else None

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        if self.cache is not None:
            self.cache.clear_rows((row, row + 1))

    def observe(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        hidden = hidden.to(self.features.dtype)
        for start in range(0, hidden.shape[1], PREFILL_CHUNK):
            piece = hidden[:, start:start + PREFILL_CHUNK]
            self._observe_piece(rows, piece, (counts - start).clamp(0, piece.shape[1]))

    def _observe_piece(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        if self.prefix is not None and self.cache is not None:
            step = self.cache.plan(rows, chain(hidden.shape[1]))
            hidden = self.prefix.step(hidden, self.cache, step)
            self.cache.lengths[rows[0]:rows[1]] += counts
        batch = torch.arange(len(counts), device=hidden.device)
        last = hidden[batch, (counts - 1).clamp(min=0)]
        kept = self.features[rows[0]:rows[1]]
        self.features[rows[0]:rows[1]] = torch.where((counts > 0)[:, None], last, kept)

    def propose(self, roots: Tensor, positions: Sequence[int], choosers: Sequence[Chooser]) -> Proposal:
        tree = self.trees.for_batch(len(roots))
        tokens = roots.new_full((len(roots), tree.size), -1)
        tokens[:, 0] = roots
        for depth, level in enumerate(tree.levels):
            ranked = self._ranked(tree, depth, tokens, positions, choosers)
            source_of = level.source_of if self.drafter.config.sequential else torch.zeros_like(level.source_of)
            tokens[:, level.nodes.start:level.nodes.stop] = ranked[:, source_of, level.ranks]
        return Proposal(tokens, tree.topology.forest)

    def _ranked(self, tree: Tree, depth: int, tokens: Tensor, positions: Sequence[int],
                choosers: Sequence[Chooser]) -> Tensor:
        """Candidate tokens [B, sources, width] below the nodes of `depth` that have children, best first."""
        level = tree.levels[depth]
        batch = len(tokens)
        if self.drafter.config.sequential:
            routes = tree.topology.routes[list(level.sources), :depth + 1]      # [sources, depth + 1]
            path = self.drafter.embed(tokens[:, routes])
        else:  # what was drafted makes no difference: one source stands for all
            path = self.features.new_zeros(batch, 1, depth + 1, 0)
        features = self.features[:batch, None].expand(-1, path.shape[1], -1)
        logits = self.drafter.draft_logits(self.drafter.head_hidden(depth, features, path))
        where = [position + depth + 1 for position in positions]
        scores = rank_scores(logits, where, choosers, self.draft_ids) if self.shared_noise else logits
        return self.draft_ids[scores.topk(min(level.width, scores.shape[-1]), dim=-1).indices]

    def move(self, source: int, target: int) -> None:
        self.features[target] = self.features[source]
        if self.cache is not None:
            self.cache.move_row(source, target)

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        if self.cache is not None:
            self.cache.copy_beginning(source, target, count)


def open_session(drafter: HeadDrafter | NgramDrafter | None, trees: TreeSet, rows: int, slots: int,
                 shared_noise: bool = True) -> Session:
    """The session of a drafter for `rows` rows of at most `slots` tokens."""
    if drafter is None:
        return PlainSession()
    if isinstance(drafter, NgramDrafter):
        return NgramSession(drafter, rows)
    return HeadSession(drafter, trees, rows, slots, shared_noise)
