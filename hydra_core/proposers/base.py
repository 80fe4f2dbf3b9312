"""Filling a tree with tokens, and what a drafter must remember of each row to do so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
from torch import Tensor

from hydra_core.base.graphs import KV_LENS, NODES, ROWS, Recorder, Run, rounded
from hydra_core.heads import HeadDrafter
from hydra_core.proposers.head_features import HeadFeatures
from hydra_core.sampling.request import TokenLogprob
from hydra_core.sampling.sampler import Sampler, rank_scores
from hydra_core.tree.forest import Forest
from hydra_core.tree.topology import Tree, TreeSet, chain


@dataclass(frozen=True)
class StepTimes:
    """Wall seconds by phase, and the `steps` (base forwards over drafts) they hold.

    `draft`: filling trees, prefix layer included; `verify`: the base's forward and logits; `accept`: choosing; `commit`:
    moving keys and values, and giving tokens on. `predicted`: what the drafter's cost table foretold for draft, verify,
    accept and commit together, 0 where it foretells nothing. On a GPU queued work counts where it is waited for.
    """

    steps: int = 0
    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    accept: float = 0.0
    commit: float = 0.0
    predicted: float = 0.0

    def __sub__(self, earlier: StepTimes) -> StepTimes:
        return StepTimes(*(getattr(self, part.name) - getattr(earlier, part.name) for part in fields(self)))

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Accepted:
    """`path`: [B, M] int64 nodes from the root down, padded by repeating the last, M at most the trees' depth + 1; `counts`: [B]
    nodes kept, root included; `emitted`: for each row the base's choice after each kept node; `logprobs`: for each row and
    choice, where they were asked for."""

    path: Tensor
    counts: Tensor
    emitted: list[list[int]]
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


@dataclass(frozen=True)
class Proposal:
    """`tokens`: [B, N] int64, node 0 the root, -1 where nothing was drafted, which comes after all that was; `forest`: its
    shape; `seconds`: what the step is foretold to take, 0 where nobody foretells it."""

    tokens: Tensor
    forest: Forest
    seconds: float = 0.0


class Proposer(Protocol):
    """A drafter's memory of the running rows. Rows are 0..B-1 without holes; `move` fills a hole from the end."""

    max_nodes: int

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None: ...

    def observe(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        """Newly committed hidden states [B, M, D], the first `counts` [B] of each row."""
        ...

    def emit(self, row: int, tokens: Sequence[int]) -> None: ...

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        """`roots`: [B] tokens; `positions`: [B] where they stand; `samplers`: how each row will choose."""
        ...

    def learn(self, proposal: Proposal, accepted: Accepted) -> None:
        """What became of a draft."""
        ...

    def timed(self, times: StepTimes) -> None:
        """What the step took, draft and all."""
        ...

    def move(self, source: int, target: int) -> None: ...

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        """Row `target` begins with the first `count` tokens of row `source`."""
        ...


class PlainProposer:
    """No drafts: the root alone."""

    max_nodes = 1

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        """Nothing to remember."""

    def observe(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        """Nothing to remember."""

    def emit(self, row: int, tokens: Sequence[int]) -> None:
        """Nothing to remember."""

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        return Proposal(roots[:, None], chain(1))

    def learn(self, proposal: Proposal, accepted: Accepted) -> None:
        """Nothing to learn."""

    def timed(self, times: StepTimes) -> None:
        """Nothing to learn."""

    def move(self, source: int, target: int) -> None:
        """Nothing to move."""

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        """Nothing to copy."""


@dataclass(frozen=True)
class DeviceLevel:
    """A level of a fixed tree where it is drafted: `nodes`; for each of its n nodes `source_of` and `ranks` [n] int64; `routes`:
    [sources, depth] int64, the nodes from the root to each source; `width`: candidates needed from each source."""

    nodes: slice
    source_of: Tensor
    ranks: Tensor
    routes: Tensor
    width: int

    @classmethod
    def all_of(cls, tree: Tree, sequential: bool, device: torch.device) -> tuple[DeviceLevel, ...]:
        """`sequential`: candidates depend on the path to their source; else the first source stands for all."""
        return tuple(cls(
            slice(level.nodes.start, level.nodes.stop),
            (level.source_of if sequential else torch.zeros_like(level.source_of)).to(device), level.ranks.to(device),
            tree.topology.routes[list(level.sources), :depth].to(device), level.width)
            for depth, level in enumerate(tree.levels, start=1))


class HeadProposer(PlainProposer):
    """Trained heads and a tree that is fixed for each batch size.

    `recorder`: where greedy rows are drafted for by recorded steps, see `RecordedDrafts`.
    """

    def __init__(self, drafter: HeadDrafter, trees: TreeSet, rows: int, slots: int, shared_noise: bool = True,
                 recorder: Recorder | None = None) -> None:
        self.drafter, self.trees, self.shared_noise = drafter, trees, shared_noise
        drafter.pack()
        self.inputs = HeadFeatures(drafter, rows, slots, recorded=recorder is not None)
        self.draft_ids = drafter.draft_vocab.ids.to(drafter.weight.device)
        self.max_nodes = trees.max_nodes
        self.recorded = None if recorder is None else RecordedDrafts(self, rows, recorder)
        self._levels: dict[Tree, tuple[DeviceLevel, ...]] = {}

    @property
    def features(self) -> Tensor:
        """[R, D] that heads read, what waits included."""
        self.inputs.catch_up()
        return self.inputs.features

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        self.inputs.clear(row)

    def observe(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        self.inputs.observe(rows, hidden, counts)

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        tree = self.trees.for_batch(len(roots))
        noisy = self.shared_noise and any(sampler.request.temperature for sampler in samplers)
        if tree.levels and self.recorded is not None and not noisy:
            return Proposal(self.recorded(tree, roots, max(positions)), tree.topology.forest)
        if tree.levels:
            self.inputs.catch_up()
        tokens = roots.new_full((len(roots), tree.size), -1)
        tokens[:, 0] = roots
        self.fill(tree, tokens, positions, samplers if noisy else ())
        return Proposal(tokens, tree.topology.forest)

    def fill(self, tree: Tree, tokens: Tensor, positions: Sequence[int], noisy: Sequence[Sampler]) -> None:
        """Candidates for all nodes but the root, into `tokens` [B, N]; `noisy`: how rows choose whose noise counts, or none."""
        for depth, level in enumerate(self._on_device(tree)):
            ranked = self._ranked(level, depth, tokens, positions, noisy)
            tokens[:, level.nodes] = ranked[:, level.source_of, level.ranks]

    def _on_device(self, tree: Tree) -> tuple[DeviceLevel, ...]:
        if tree not in self._levels:
            self._levels[tree] = DeviceLevel.all_of(tree, self.drafter.config.sequential, self.draft_ids.device)
        return self._levels[tree]

    def _ranked(self, level: DeviceLevel, depth: int, tokens: Tensor, positions: Sequence[int],
                noisy: Sequence[Sampler]) -> Tensor:
        """Candidate tokens [B, sources, width] below the nodes of `depth` that have children, best first."""
        batch = len(tokens)
        if self.drafter.config.sequential:
            path = self.drafter.embed(tokens[:, level.routes])
        else:  # what was drafted makes no difference: one source stands for all
            path = self.inputs.features.new_zeros(batch, 1, depth + 1, 0)
        features = self.inputs.features[:batch]
        if not noisy:
            return self.draft_ids[self.drafter.candidates(depth, features, path, level.width)[0]]
        logits = self.drafter.candidate_logits(depth, features, path)
        scores = rank_scores(logits, [position + depth + 1 for position in positions], noisy, self.draft_ids)
        return self.draft_ids[scores.topk(min(level.width, scores.shape[-1]), dim=-1).indices]

    def move(self, source: int, target: int) -> None:
        self.inputs.move(source, target)

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        self.inputs.copy_beginning(source, target, count)


class RecordedDrafts:
    """Drafting for greedy rows as one recorded step: what waits is read and the tree filled, with nothing asked of the
    device between; see `hydra_core.base.graphs`, whose rounding holds here too.

    A row beyond the decoding ones has nothing waiting, or is nobody's: what is written past its end is never looked at.
    """

    def __init__(self, proposer: HeadProposer, rows: int, recorder: Recorder) -> None:
        self.proposer, self.rows, self.recorder = proposer, rows, recorder
        self.roots = torch.zeros(rows, dtype=torch.int64, device=proposer.draft_ids.device)
        self.recorded: dict[tuple[int, Tree, int, int], Run] = {}
        self._tables: list[tuple[Tensor, ...]] = []

    @torch.inference_mode()
    def __call__(self, tree: Tree, roots: Tensor, longest: int) -> Tensor:
        """Tokens [B, N] of `tree` below `roots` [B]; they last until the next call. `longest`: committed tokens of the longest
        row."""
        inputs, batch = self.proposer.inputs, len(roots)
        rows = rounded(batch, ROWS, self.rows)
        width = rounded(inputs.most, NODES, inputs.waiting.shape[1]) if inputs.most else 0
        span = rounded(longest + width, KV_LENS, inputs.cache.slots) if inputs.cache is not None and width else 0
        self.roots[:batch] = roots
        run = self.recorded.get((rows, tree, width, span))
        if run is None:
            run = self.recorded[rows, tree, width, span] = self._record(rows, tree, width, span)
        inputs.most = 0
        return run()[:batch]

    def _record(self, rows: int, tree: Tree, width: int, span: int) -> Run:
        proposer, inputs = self.proposer, self.proposer.inputs

        def draft() -> Tensor:
            if width:
                inputs.read_waiting(rows, width, span)
            tokens = self.roots.new_full((rows, tree.size), -1)
            tokens[:, 0] = self.roots[:rows]
            proposer.fill(tree, tokens, (), ())
            return tokens

        run = self.recorder(draft)
        if inputs.prefix is not None:
            self._tables.append(inputs.prefix.tables)  # a longer cache replaces them, and this recording goes on reading these
        return run
