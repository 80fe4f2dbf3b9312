"""Trained heads that fill a fixed tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hydra_core.base.graphs import Recorder, recorder_for
from hydra_core.base.kv_cache import KVCache
from hydra_core.errors import InputError
from hydra_core.heads import HeadDrafter
from hydra_core.proposers.base import Proposal, Proposer
from hydra_core.proposers.drafter import Context, DrafterKind
from hydra_core.proposers.head_features import HeadFeatures, feature_bytes, kept_feature_bytes
from hydra_core.proposers.plain import PlainProposer
from hydra_core.proposers.recorded import RecordedDrafts
from hydra_core.sampling.sampler import Sampler, rank_scores
from hydra_core.tree.draft_tree import DraftTree, TreeLevel, TreeSet, default_trees


class HeadProposer(PlainProposer):
    """Trained heads and a tree that is fixed for each batch size.

    `rows`, `slots`: of the KV cache; `shared_noise`: candidates of sampled sequences are ranked with the noise of the coming
    draw; `recorder`: greedy drafts are recorded steps, see `RecordedDrafts`; None: they are not recorded.
    """

    def __init__(self, drafter: HeadDrafter, trees: TreeSet, rows: int, slots: int, shared_noise: bool = True,
                 recorder: Recorder | None = None) -> None:
        self.drafter, self.trees, self.shared_noise = drafter, trees, shared_noise
        drafter.pack()
        self.inputs = HeadFeatures(drafter, rows, slots, recorded=recorder is not None)
        self.draft_ids = drafter.draft_vocab.ids.to(drafter.weight.device)
        self.max_nodes = trees.max_nodes
        self.recorded = None if recorder is None else RecordedDrafts(self.inputs, self._fill_greedy, rows, recorder)
        self._levels: dict[DraftTree, tuple[TreeLevel, ...]] = {}

    @property
    def features(self) -> Tensor:
        """[R, D], what the heads read for each row, pending hidden states included."""
        self.inputs.catch_up()
        return self.inputs.features

    @property
    def kv_caches(self) -> tuple[KVCache, ...]:
        return self.inputs.kv_caches

    def catch_up(self, row: int) -> None:
        self.inputs.catch_up()

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        self.inputs.clear(row)

    def adopt(self, row: int, prompt_ids: Sequence[int], tokens: Sequence[int]) -> bool:
        self.admit(row, prompt_ids)
        return self.inputs.prefix is None  # without it, heads read only the newest hidden state, which the next step brings

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        self.inputs.copy_prefix(source, target, count)

    def commit(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor, tokens: Sequence[Sequence[int]] = ()) -> None:
        self.inputs.commit(rows, hidden, counts)

    def move(self, source: int, target: int) -> None:
        self.inputs.move(source, target)

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        tree = self.trees.for_batch(len(roots))
        noisy = self.shared_noise and any(sampler.request.temperature for sampler in samplers)
        if tree.levels and self.recorded is not None and not noisy:
            return Proposal(self.recorded(tree, roots, max(positions)), tree.as_batch)
        if tree.levels:
            self.inputs.catch_up()
        tokens = roots.new_full((len(roots), tree.size), -1)
        tokens[:, 0] = roots
        self._fill(tree, tokens, positions, samplers if noisy else ())
        return Proposal(tokens, tree.as_batch)

    def _fill_greedy(self, tree: DraftTree, tokens: Tensor) -> None:
        self._fill(tree, tokens, (), ())

    def _fill(self, tree: DraftTree, tokens: Tensor, positions: Sequence[int], noisy: Sequence[Sampler]) -> None:
        """Write candidates for all nodes but the root into `tokens` [B, N].

        `noisy`: the samplers whose noise ranks the candidates, or none.
        """
        for depth, level in enumerate(self._levels_of(tree)):
            ranked = self._ranked(level, depth, tokens, positions, noisy)
            tokens[:, level.nodes] = ranked[:, level.source_of, level.ranks]

    def _levels_of(self, tree: DraftTree) -> tuple[TreeLevel, ...]:
        """The levels on the heads' device. Candidates of heads that do not read the path are the same below every source, so
        the first source stands for all."""
        if tree not in self._levels:
            levels = [level.to(self.draft_ids.device) for level in tree.levels]
            if not self.drafter.config.sequential:
                levels = [replace(level, source_of=torch.zeros_like(level.source_of)) for level in levels]
            self._levels[tree] = tuple(levels)
        return self._levels[tree]

    def _ranked(self, level: TreeLevel, depth: int, tokens: Tensor, positions: Sequence[int],
                noisy: Sequence[Sampler]) -> Tensor:
        """Candidate tokens [B, sources, width] below the nodes of `depth` that have children, best first."""
        batch = len(tokens)
        if self.drafter.config.sequential:
            path = self.drafter.embed(tokens[:, level.paths])
        else:
            path = self.inputs.features.new_zeros(batch, 1, depth + 1, 0)
        features = self.inputs.features[:batch]
        if not noisy:
            return self.draft_ids[self.drafter.candidates(depth, features, path, level.width)[0]]
        logits = self.drafter.candidate_logits(depth, features, path)
        scores = rank_scores(logits, [position + depth + 1 for position in positions], noisy, self.draft_ids)
        return self.draft_ids[scores.topk(min(level.width, scores.shape[-1]), dim=-1).indices]


class HeadKind(DrafterKind):
    """A `HeadDrafter` given alone: its heads fill fixed trees."""

    drafter: HeadDrafter
    fixed_trees = True

    @property
    def heads(self) -> HeadDrafter:
        return self.drafter

    def trees(self, asked: TreeSet | None) -> TreeSet:
        trees, heads = asked or default_trees(self.drafter.num_heads), self.drafter.num_heads
        if trees.max_depth > heads:
            raise InputError(f"trees: depth {trees.max_depth} needs more than the drafter's {heads} heads")
        highest = max((rank for tree in trees.trees.values() for path in tree.paths for rank in path), default=0)
        if highest >= len(self.drafter.draft_vocab):
            drafted = len(self.drafter.draft_vocab)
            raise InputError(f"trees: rank {highest} needs more than the {drafted} tokens that may be drafted")
        return trees

    def draft_slots(self, trees: TreeSet) -> int:
        return max(trees.max_nodes, trees.max_depth + 1)

    def device_bytes(self, rows: int, slots: int) -> int:
        return feature_bytes(self.drafter, rows, slots)

    def kept_bytes(self, tokens: int) -> int:
        return kept_feature_bytes(self.drafter, tokens)

    def open(self, context: Context) -> Proposer:
        recorder = recorder_for(torch.device(context.device), context.graphs)
        return HeadProposer(self.drafter, context.trees, context.rows, context.slots, context.shared_noise, recorder)
