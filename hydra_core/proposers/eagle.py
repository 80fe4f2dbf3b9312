"""An EAGLE layer that drafts: dynamic trees (EAGLE-2) grown from states of the base (EAGLE-1, EAGLE-3); see `heads.eagle`.

The layer's KV cache holds one entry for each committed token but the newest: position t was read with the base's state at t and
the token after it. A step first reads what was committed since, then writes its own nodes behind, which the next step overwrites:
of accepted tokens the base's own states are read, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hydra_core.base.kv_cache import KVCache
from hydra_core.heads.eagle import Eagle
from hydra_core.proposers.base import Proposal, Proposer
from hydra_core.proposers.drafter import Context, DrafterKind
from hydra_core.proposers.growing import Growth, Level, grow
from hydra_core.proposers.plain import PlainProposer
from hydra_core.sampling.sampler import Sampler, rank_scores
from hydra_core.tree.batch import chain
from hydra_core.tree.draft_tree import TreeSet

ROOM = 128
"""States of a row that may wait for the layer; longer input is read at once."""


def growth_of(drafter: Eagle) -> Growth:
    """The trees that the layer grows: as deep as it was trained."""
    return replace(Growth(), depth=drafter.num_heads)


class EagleProposer(PlainProposer):
    """Keeps each sequence's text, the layer's keys and values of it, and the base's states that the layer has not read yet."""

    reads_next = True

    def __init__(self, drafter: Eagle, context: Context) -> None:
        drafter.pack()
        self.drafter, self.growth, self.context = drafter, growth_of(drafter), context
        self.max_nodes = 1 + self.growth.nodes
        self.draft_ids = drafter.draft_vocab.ids.to(drafter.weight.device)
        self.cache = drafter.layer.allocate(context.rows, context.slots + self.growth.written + ROOM)
        self.states = drafter.weight.new_zeros(context.rows, drafter.weight.shape[0])     # of the latest position of each row
        self.waiting = drafter.weight.new_zeros(context.rows, ROOM, drafter.weight.shape[0])  # what the layer will read
        self.texts: list[list[int]] = [[] for _ in range(context.rows)]
        self.cached = [0] * context.rows   # positions in the cache: `cache.lengths`, on the host
        self.counts = [0] * context.rows   # states that wait

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        self.texts[row], self.cached[row], self.counts[row] = list(prompt_ids), 0, 0
        self.cache.clear_rows((row, row + 1))

    def adopt(self, row: int, prompt_ids: Sequence[int], tokens: Sequence[int]) -> bool:
        self.admit(row, prompt_ids)
        self.texts[row] += tokens
        return False  # the base's states of its past are gone

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        self._catch_up((source, source + 1))
        self.cache.copy_prefix(source, target, count)
        self.cached[target] = count

    @property
    def kv_caches(self) -> tuple[KVCache, ...]:
        return (self.cache,)

    def catch_up(self, row: int) -> None:
        self._catch_up((row, row + 1))

    def restored(self, row: int, count: int) -> None:
        self.cached[row] = count

    def move(self, source: int, target: int) -> None:
        self.cache.move_row(source, target)
        self.states[target], self.waiting[target] = self.states[source], self.waiting[source]
        self.texts[target], self.cached[target] = self.texts[source], self.cached[source]
        self.counts[target] = self.counts[source]

    def commit(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor, tokens: Sequence[Sequence[int]] = ()) -> None:
        for row, chosen in zip(range(*rows), tokens):  # noqa: B905 (chunks of prompts come without tokens)
            self.texts[row] += chosen
        width, found = hidden.shape[1], counts.tolist()
        if width == 0:
            return
        states = self.drafter.read(hidden)
        first = 0
        while first < width:
            most = max(self.counts[rows[0]:rows[1]])
            if most + min(width - first, ROOM // 2) > ROOM:
                self._catch_up(rows)
                most = max(self.counts[rows[0]:rows[1]])
            piece = states[:, first:first + ROOM - most]
            index = torch.tensor(self.counts[rows[0]:rows[1]], device=states.device)[:, None] + torch.arange(
                piece.shape[1], device=states.device)
            self.waiting[rows[0]:rows[1]].scatter_(1, index[..., None].expand_as(piece), piece)
            for row, count in zip(range(*rows), found, strict=True):
                self.counts[row] += min(max(count - first, 0), piece.shape[1])
            first += piece.shape[1]

    def _catch_up(self, rows: tuple[int, int]) -> None:
        """Let the layer read the states that wait in `rows` and whose next token is known."""
        mine = range(*rows)
        ready = [max(min(self.counts[row], len(self.texts[row]) - 1 - self.cached[row]), 0) for row in mine]
        width = max(ready)
        if width == 0:
            return
        ids = torch.zeros(len(ready), width, dtype=torch.int64)
        for line, (row, count) in enumerate(zip(mine, ready, strict=True)):
            ids[line, :count] = torch.tensor(self.texts[row][self.cached[row] + 1:self.cached[row] + 1 + count])
        waiting, real = self.waiting[rows[0]:rows[1]], torch.tensor(ready, device=self.states.device)
        embedded = self.drafter.embed(ids.to(self.states.device))
        step = self.cache.build_metadata(rows, chain(width))
        made = self.drafter.layer.extend(waiting[:, :width], embedded, self.cache, step)
        self.cache.lengths[rows[0]:rows[1]] += real
        latest = made[torch.arange(len(ready), device=made.device), (real - 1).clamp(min=0)]
        self.states[rows[0]:rows[1]] = torch.where((real > 0)[:, None], latest, self.states[rows[0]:rows[1]])
        for line, (row, count) in enumerate(zip(mine, ready, strict=True)):
            left = self.counts[row] - count
            if count and left:
                waiting[line, :left] = waiting[line, count:count + left].clone()
            self.counts[row], self.cached[row] = left, self.cached[row] + count

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        batch = len(positions)
        self._catch_up((0, batch))
        noisy = self.context.shared_noise and any(sampler.request.temperature for sampler in samplers)
        line = torch.arange(batch, device=self.states.device)[:, None]
        states = self.states[:batch, None]

        def rank(logits: Tensor, depth: int) -> tuple[Tensor, Tensor]:
            if noisy:
                logits = rank_scores(logits, [position + depth + 1 for position in positions], samplers, self.draft_ids)
            probs, indices = logits.softmax(-1).topk(min(self.growth.width, logits.shape[-1]), dim=-1)
            return self.draft_ids[indices], probs

        def expand(level: Level) -> Tensor:
            nonlocal states
            step = self.cache.build_metadata((0, batch), level.trees, written=level.written)
            states = self.drafter.layer.extend(states[line, level.above], self.drafter.embed(level.tokens), self.cache, step)
            return self.drafter.logits_of(states)

        grown = grow(self.growth, self.drafter.logits_of(states), rank, expand)
        return grown.proposal(roots, self.growth.nodes)


class EagleKind(DrafterKind):
    """An `Eagle`, given alone: it grows trees of its own."""

    drafter: Eagle

    @property
    def taps(self) -> tuple[int, ...]:
        return self.drafter.taps

    def draft_slots(self, trees: TreeSet) -> int:
        return 1 + growth_of(self.drafter).nodes

    def device_bytes(self, rows: int, slots: int) -> int:
        weight = self.drafter.weight
        states = rows * (1 + ROOM) * weight.shape[0] * weight.element_size()
        return states + self.drafter.layer.cache_bytes(rows, slots + growth_of(self.drafter).written + ROOM)

    def kept_bytes(self, tokens: int) -> int:
        return self.drafter.layer.cache_bytes(1, tokens)

    def open(self, context: Context) -> Proposer:
        return EagleProposer(self.drafter, context)
