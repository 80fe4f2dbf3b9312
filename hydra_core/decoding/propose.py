"""Filling a tree with tokens, and what a drafter must remember of each row to do so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hydra_core.decoding.accept import Accepted
from hydra_core.decoding.choose import Chooser, rank_scores
from hydra_core.decoding.pending import HeadFeatures
from hydra_core.drafters import HeadDrafter
from hydra_core.tree.forest import Forest
from hydra_core.tree.topology import Tree, TreeSet, chain


@dataclass(frozen=True)
class Proposal:
    """`tokens`: [B, N] int64, node 0 the root, -1 where nothing was drafted; `forest`: its shape; `seconds`: what the step
    is foretold to take, 0 where nobody foretells it."""

    tokens: Tensor
    forest: Forest
    seconds: float = 0.0


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

    def learn(self, proposal: Proposal, accepted: Accepted) -> None:
        """What became of a draft."""
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

    def learn(self, proposal: Proposal, accepted: Accepted) -> None:
        """Nothing to learn."""

    def move(self, source: int, target: int) -> None:
        """Nothing to move."""

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        """Nothing to copy."""


class HeadSession(PlainSession):
    """Trained heads and a tree that is fixed for each batch size."""

    def __init__(self, drafter: HeadDrafter, trees: TreeSet, rows: int, slots: int, shared_noise: bool = True) -> None:
        self.drafter, self.trees, self.shared_noise = drafter, trees, shared_noise
        drafter.pack()
        self.inputs = HeadFeatures(drafter, rows, slots)
        self.draft_ids = drafter.draft_vocab.ids.to(drafter.weight.device)
        self.max_nodes = trees.max_nodes

    @property
    def features(self) -> Tensor:
        """[R, D] that heads read, what waits included."""
        self.inputs.catch_up()
        return self.inputs.features

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        self.inputs.clear(row)

    def observe(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        self.inputs.observe(rows, hidden, counts)

    def propose(self, roots: Tensor, positions: Sequence[int], choosers: Sequence[Chooser]) -> Proposal:
        tree = self.trees.for_batch(len(roots))
        if tree.levels:
            self.inputs.catch_up()
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
            path = self.inputs.features.new_zeros(batch, 1, depth + 1, 0)
        features = self.inputs.features[:batch]
        if not self.shared_noise or not any(chooser.request.temperature for chooser in choosers):
            return self.draft_ids[self.drafter.candidates(depth, features, path, level.width)[0]]
        logits = self.drafter.candidate_logits(depth, features, path)
        scores = rank_scores(logits, [position + depth + 1 for position in positions], choosers, self.draft_ids)
        return self.draft_ids[scores.topk(min(level.width, scores.shape[-1]), dim=-1).indices]

    def move(self, source: int, target: int) -> None:
        self.inputs.move(source, target)

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        self.inputs.copy_beginning(source, target, count)
