"""A separate draft model: any small causal model with the base's tokenizer drafts (speculative decoding, arXiv 2211.17192).

It has a KV cache of its own, which holds the tokens of each sequence and, during a step, the nodes of the tree that it grows.
What verification accepts stays there, the rest is overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hydra_core.base.kv_cache import KVCache
from hydra_core.base.model import PREFILL_CHUNK, Base
from hydra_core.errors import InputError
from hydra_core.proposers.base import Proposal, Proposer
from hydra_core.proposers.drafter import Context, DrafterKind
from hydra_core.proposers.growing import Grown, Growth, Level, grow, padded
from hydra_core.proposers.plain import PlainProposer
from hydra_core.sampling.sampler import Sampler, rank_scores
from hydra_core.tree.batch import chain
from hydra_core.tree.draft_tree import TreeSet

MOST_OTHER_TOKENS = 0.01
"""Share of the vocabulary's ids that may stand for another text: special tokens that one family names differently."""


@dataclass(frozen=True, eq=False)
class DraftModel:
    """A loaded model that drafts for another one, and the trees that it grows."""

    base: Base
    growth: Growth = field(default_factory=Growth)


class DraftModelProposer(PlainProposer):
    """Keeps each sequence's text, and the draft model's keys and values of a beginning of it.

    What is missing there is computed in one forward when it is needed: the newest tokens of every step, chunks of a prompt beside
    the base's own, or all of a text that another proposer drafted for.
    """

    def __init__(self, drafter: DraftModel, context: Context) -> None:
        self.base, self.growth, self.context = drafter.base, drafter.growth, context
        self.max_nodes = 1 + drafter.growth.nodes
        self.cache = self.base.allocate(context.rows, context.slots + drafter.growth.written)
        self.texts: list[list[int]] = [[] for _ in range(context.rows)]
        self.cached = [0] * context.rows     # tokens of each text in the cache: `cache.lengths`, on the host
        self.prompted = [0] * context.rows   # tokens of each prompt that the base has computed
        self.most_id = self.base.vocabulary.embedding.shape[0] - 1
        self.ids = torch.arange(min(self.base.vocab_size, context.vocab_size or self.base.vocab_size), device=self.base.device)
        self.grown: Grown | None = None      # of the step that is being verified

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        self.texts[row], self.cached[row], self.prompted[row] = list(prompt_ids), 0, 0
        self.cache.clear_rows((row, row + 1))

    def adopt(self, row: int, prompt_ids: Sequence[int], tokens: Sequence[int]) -> bool:
        self.admit(row, prompt_ids)
        self.texts[row] += tokens
        return True

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        known = min(count, self.cached[source])
        self.cache.copy_prefix(source, target, known)
        self.cached[target], self.prompted[target] = known, count

    @property
    def kv_caches(self) -> tuple[KVCache, ...]:
        return (self.cache,)

    def catch_up(self, row: int) -> None:
        self._read((row, row + 1), [len(self.texts[row]) - 1])  # the newest token is not in the base's cache

    def restored(self, row: int, count: int) -> None:
        self.cached[row] = self.prompted[row] = count

    def move(self, source: int, target: int) -> None:
        self.cache.move_row(source, target)
        self.texts[target], self.cached[target] = self.texts[source], self.cached[source]
        self.prompted[target] = self.prompted[source]

    def commit(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor, tokens: Sequence[Sequence[int]] = ()) -> None:
        if not tokens:  # a chunk of prompts
            for row, count in zip(range(*rows), counts.tolist(), strict=True):
                self.prompted[row] += count
            self._read(rows, self.prompted[rows[0]:rows[1]])
            return
        if self.grown is not None:
            paths = self.grown.written_paths([chosen[:-1] for chosen in tokens])  # the last one is computed in the next step
            if any(paths):
                self.cache.commit((0, len(paths)), *padded(paths, self.cache.lengths.device), forest=True)
            for row, path in enumerate(paths):
                self.cached[row] += len(path)
            self.grown = None
        for row, chosen in zip(range(*rows), tokens, strict=True):
            self.texts[row] += chosen

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        batch = len(positions)
        first = self._read((0, batch), [len(text) for text in self.texts[:batch]])
        noisy = self.context.shared_noise and any(sampler.request.temperature for sampler in samplers)

        def rank(logits: Tensor, depth: int) -> tuple[Tensor, Tensor]:
            scores = logits[..., :len(self.ids)]
            if noisy:
                scores = rank_scores(scores, [position + depth + 1 for position in positions], samplers, self.ids)
            probs, tokens = scores.softmax(-1).topk(min(self.growth.width, scores.shape[-1]), dim=-1)
            return tokens, probs

        self.grown = grow(self.growth, self.base.logits(first)[:, None], rank, self._expand)
        return self.grown.proposal(roots, self.growth.nodes)

    def _expand(self, level: Level) -> Tensor:
        ids = level.tokens.clamp(max=self.most_id)
        hidden = self.base.forward(ids, self.cache, (0, len(ids)), level.trees, written=level.written)
        return self.base.logits(hidden)

    def _read(self, rows: tuple[int, int], ends: Sequence[int]) -> Tensor:
        """Bring the cache of `rows` up to `ends` tokens of each text: hidden states [B, D] of the last tokens that were read."""
        mine, last = range(*rows), self.base.vocabulary.embedding.new_zeros(len(ends), self.base.vocabulary.width)
        while (most := max(end - self.cached[row] for row, end in zip(mine, ends, strict=True))) > 0:
            # padding is written too, and needs room in every row
            width = min(most, PREFILL_CHUNK, *(self.cache.slots - self.cached[row] for row in mine))
            counts = [min(max(end - self.cached[row], 0), width) for row, end in zip(mine, ends, strict=True)]
            ids = torch.zeros(len(ends), width, dtype=torch.int64)
            for line, (row, count) in enumerate(zip(mine, counts, strict=True)):
                ids[line, :count] = torch.tensor(self.texts[row][self.cached[row]:self.cached[row] + count])
                self.cached[row] += count
            real = torch.tensor(counts, device=self.base.device)
            ids = ids.clamp(max=self.most_id).to(self.base.device)
            hidden = self.base.forward(ids, self.cache, rows, chain(width), real)
            self.cache.lengths[rows[0]:rows[1]] += real
            newest = hidden[torch.arange(len(ends), device=hidden.device), (real - 1).clamp(min=0)]
            last = torch.where((real > 0)[:, None], newest, last)
        return last


class DraftModelKind(DrafterKind):
    """A `DraftModel`."""

    drafter: DraftModel

    def check(self, base: Base) -> None:
        """Raise InputError unless the draft model can hold trees, runs where `base` does and has its tokens."""
        draft = self.drafter.base
        name = f"draft model {draft.identity.name}"
        if not draft.supports_tree:
            raise InputError(f"{name}: keeps a state that cannot be rolled back: use a model of attention alone")
        if draft.device != base.device:
            raise InputError(f"{name}: is on {draft.device}, the base on {base.device}: load both on one device")
        if draft.tokenizer is None or base.tokenizer is None:
            return
        ours, theirs = (model.tokenizer.get_vocab() for model in (base, draft))
        other = sum(theirs.get(token) != number for token, number in ours.items())
        if other > MOST_OTHER_TOKENS * len(ours):
            raise InputError(f"{name}: {other} of the base's {len(ours)} tokens have other ids there: use a model with the "
                             "base's own tokenizer")

    def draft_slots(self, trees: TreeSet) -> int:
        return 1 + self.drafter.growth.nodes

    def device_bytes(self, rows: int, slots: int) -> int:
        """Its keys and values; its weights are there already."""
        return self.drafter.base.decoder.cache_bytes(rows, slots + self.drafter.growth.written)

    def kept_bytes(self, tokens: int) -> int:
        return self.drafter.base.decoder.cache_bytes(1, tokens)

    def open(self, context: Context) -> Proposer:
        return DraftModelProposer(self.drafter, context)
