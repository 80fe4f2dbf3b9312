"""Drafting that decides at every step: nothing, copied text, heads or both, and how many nodes, by expected gain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hydra_core.decoding.accept import Accepted
from hydra_core.decoding.choose import Chooser, rank_scores
from hydra_core.decoding.growth import Candidates, Copied, Worth, add_copied, select, weigh
from hydra_core.decoding.pending import HeadFeatures
from hydra_core.decoding.propose import PlainSession, Proposal
from hydra_core.decoding.rates import Bools, Floats, Ints, Rates, match_class
from hydra_core.drafters import AdaptiveDrafter, HeadDrafter, NgramIndex

WIDTH = 6
"""Candidates taken from a node."""
BEAM = 4
"""Nodes of a depth that are drafted on."""
MOST_NODES = 48
"""Nodes of a row at most, whatever they cost."""
RETRY_STEPS = 24
"""Steps after which heads that did not seem to pay are tried again."""
PATIENCE = 0.1
"""Weight of a new step in the running figures."""


def most_nodes(drafter: AdaptiveDrafter) -> int:
    """Nodes of the largest tree that can be grown: as many as were timed, and no more than there is to draft."""
    limit = min(MOST_NODES, drafter.costs.most_nodes)
    if drafter.heads is None:
        return min(limit, drafter.ngram.length + 1 if drafter.ngram else 1)
    return limit


class AdaptiveSession(PlainSession):
    """Trees grown by learned chances and measured costs; see `growth` and `rates`.

    Heads run where the base does; what is made of their candidates is decided on the host, in small arrays that a GPU would
    only wait for.
    """

    def __init__(self, drafter: AdaptiveDrafter, rows: int, slots: int, shared_noise: bool = True,
                 device: torch.device | str = "cpu") -> None:
        self.drafter, self.shared_noise = drafter, shared_noise
        self.max_nodes = most_nodes(drafter)
        heads = drafter.heads
        self.depths = heads.num_heads if heads is not None else 0
        self.indexes = [NgramIndex(drafter.ngram) for _ in range(rows)] if drafter.ngram else []
        self.device = torch.device(device) if heads is None else heads.weight.device
        if heads is not None:
            heads.pack()
            self.inputs = HeadFeatures(heads, rows, slots)
            self.draft_ids = heads.draft_vocab.ids.to(self.device)
        self.rates = Rates(self.depths, rows)
        self._seconds: dict[tuple[int, int, int], Floats] = {}
        self._verify: dict[tuple[int, int], Floats] = {}
        self._extra = [1.0] * 4     # tokens a row that heads add to copied ones, by how sure those are
        self._idle = 0              # steps since heads were used
        self._kinds: Ints | None = None

    @property
    def features(self) -> Tensor:
        """[R, D] that heads read, what waits included."""
        self.inputs.catch_up()
        return self.inputs.features

    # -- what is remembered of rows ------------------------------------------------------------------------------------

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        self.rates.restart(row)
        if self.drafter.ngram is not None:
            self.indexes[row] = NgramIndex(self.drafter.ngram)
            self.indexes[row].extend(prompt_ids)
        if self.drafter.heads is not None:
            self.inputs.clear(row)

    def observe(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor) -> None:
        if self.drafter.heads is not None:
            self.inputs.observe(rows, hidden, counts)

    def emit(self, row: int, tokens: Sequence[int]) -> None:
        if self.indexes:
            self.indexes[row].extend(tokens)

    def move(self, source: int, target: int) -> None:
        self.rates.move(source, target)
        if self.indexes:
            self.indexes[target] = self.indexes[source]
        if self.drafter.heads is not None:
            self.inputs.move(source, target)

    def copy_beginning(self, source: int, target: int, count: int) -> None:
        if self.drafter.heads is not None:
            self.inputs.copy_beginning(source, target, count)

    def learn(self, proposal: Proposal, accepted: Accepted) -> None:
        """File what stood and what did not."""
        kinds = self._kinds
        if kinds is None or kinds.shape[1] == 1:
            return
        rows, stood = np.arange(len(kinds))[:, None], np.zeros(kinds.shape, dtype=np.bool_)
        stood[rows, accepted.path.cpu().numpy()] = True
        parents = proposal.forest.parents.numpy().clip(0)
        known = kinds >= 0
        self.rates.learn(kinds, known & stood[rows, parents], known & stood)

    # -- one draft -----------------------------------------------------------------------------------------------------

    def propose(self, roots: Tensor, positions: Sequence[int], choosers: Sequence[Chooser]) -> Proposal:
        sampled = np.array([chooser.request.temperature > 0 for chooser in choosers])
        roots_alone = Candidates.roots(roots.cpu().numpy())
        copied = self._copied(len(roots))
        candidates = roots_alone if copied is None else add_copied(roots_alone, copied, self.rates, sampled)
        worth = weigh(candidates, self._step_seconds(positions, 0))
        if self.drafter.heads is not None and self._heads_pay(positions, worth):
            alone = worth.expected
            candidates = self._grow(self.drafter.heads, roots_alone, positions, choosers, sampled)
            seconds = self._step_seconds(positions, candidates.depth)
            if copied is not None:
                candidates = add_copied(candidates, copied, self.rates, sampled)
            worth = weigh(candidates, seconds)
            self._note(alone, worth.expected)
        else:
            self._idle += 1
        grown = select(candidates, worth)
        self._kinds = grown.kinds
        return Proposal(torch.tensor(grown.tokens, device=self.device), grown.forest, worth.seconds)

    def _copied(self, batch: int) -> Copied | None:
        """What the text of each row would go on with, or None where no row finds anything."""
        if self.drafter.ngram is None:
            return None
        length = min(self.drafter.ngram.length, self.max_nodes - 1)
        found = [index.match(length) for index in self.indexes[:batch]]
        if length < 1 or not any(match.matched for match in found):
            return None
        tokens = np.array([match.tokens or (-1,) * length for match in found])
        return Copied(tokens, np.array([match_class(match.matched) for match in found]))

    def _grow(self, heads: HeadDrafter, known: Candidates, positions: Sequence[int], choosers: Sequence[Chooser],
              sampled: Bools) -> Candidates:
        """Candidates of every head, the likeliest nodes of a depth drafted on."""
        self.inputs.catch_up()
        batch = len(positions)
        rows, features = np.arange(batch)[:, None], self.inputs.features[:batch]
        at = np.zeros_like(known.tokens)                                        # [B, W] nodes that are drafted on
        chances, path = known.chances, self._embedded(heads, known.tokens)      # [B, W], [B, W, depth + 1, D]
        first, columns = 1, []
        for depth in range(self.depths):
            tokens, given = self._candidates(heads, depth, features, path, positions, choosers)
            kinds = self.rates.head_kinds(depth, given, sampled)                # [B, W or 1, width]
            below = (chances[..., None] * self.rates.chances(kinds)).reshape(batch, -1)
            width = kinds.shape[2]
            if kinds.shape[1] < at.shape[1]:
                tokens, kinds = (np.broadcast_to(part, (batch, at.shape[1], width)) for part in (tokens, kinds))
            tokens = tokens.reshape(batch, -1)
            columns.append((tokens, at.repeat(width, axis=1), kinds.reshape(batch, -1), below))
            if depth + 1 == self.depths:
                break
            best = (-below).argsort(axis=1, kind="stable")[:, :BEAM]
            chances = below[rows, best]
            if not self._deeper_pays(positions, depth + 1, chances):
                break
            at, first = first + best, first + below.shape[1]
            above = path[torch.arange(batch, device=self.device)[:, None], torch.tensor(best // width, device=self.device)]
            path = torch.cat((above, self._embedded(heads, tokens[rows, best])), dim=2)
        tokens, parents, kinds, below = (np.concatenate(parts, 1) for parts in zip(*columns, strict=True))
        return known.joined(tokens, parents, kinds, below, len(columns))

    def _embedded(self, heads: HeadDrafter, tokens: Ints) -> Tensor:
        """Paths of one token each: [B, W, 1, D] where heads run, of `tokens` [B, W] on the host."""
        return heads.embed(torch.tensor(tokens, device=self.device))[:, :, None]

    def _candidates(self, heads: HeadDrafter, depth: int, features: Tensor, path: Tensor, positions: Sequence[int],
                    choosers: Sequence[Chooser]) -> tuple[Ints, Floats]:
        """Tokens [B, W, width] and the head's probabilities of them, on the host; W is 1 where the path makes no difference."""
        if not heads.config.sequential:
            path = path[:, :1]
        if not self.shared_noise or not any(chooser.request.temperature for chooser in choosers):
            indices, values = heads.candidates(depth, features, path, WIDTH)
        else:
            logits = rank_scores(heads.candidate_logits(depth, features, path), [position + depth + 1 for position in positions],
                                 choosers, self.draft_ids)
            values, indices = logits.softmax(-1).topk(min(WIDTH, logits.shape[-1]), dim=-1)
        return self.draft_ids[indices].cpu().numpy(), values.cpu().double().numpy()

    # -- what pays -----------------------------------------------------------------------------------------------------

    def _step_seconds(self, positions: Sequence[int], depth: int) -> Floats:
        """Seconds of a step by nodes [most], of rows that stand at `positions`; `depth` heads are drafted with, 0: none."""
        batch, context = len(positions), self._context(positions)
        known = self._seconds.get((batch, depth, context))
        if known is None:
            known = self._verify_seconds(batch, context) + self.drafter.costs.draft_seconds(batch, depth)
            self._seconds[batch, depth, context] = known
        return known

    def _verify_seconds(self, batch: int, context: int) -> Floats:
        """The base's part of those."""
        known = self._verify.get((batch, context))
        if known is None:
            known = np.array([self.drafter.costs.verify_seconds(batch, nodes, context) for nodes in range(1, self.max_nodes + 1)])
            self._verify[batch, context] = known
        return known

    def _heads_pay(self, positions: Sequence[int], worth: Worth) -> bool:
        """Whether heads are expected to make more tokens a second than what is copied; now and then simply tried."""
        if self._idle >= RETRY_STEPS:
            return True
        seconds = self._step_seconds(positions, self.depths)
        with_heads = (worth.expected + self._extra[_sureness(worth.expected)]) / float(
            seconds[min(worth.nodes + WIDTH, len(seconds)) - 1])
        return with_heads * len(positions) > worth.gain

    def _deeper_pays(self, positions: Sequence[int], depth: int, chances: Floats) -> bool:
        """Whether the likeliest paths are likely enough for another head to be asked."""
        batch = len(positions)
        price = self._step_seconds(positions, depth + 1)[0] - self._step_seconds(positions, depth)[0]
        return bool(float(chances.sum()) / batch * self._verify_seconds(batch, self._context(positions))[0] > price)

    def _context(self, positions: Sequence[int]) -> int:
        """Committed tokens of a row in the mean, as the nearest power of two and no less than the costs tell apart: a few
        numbers, for which a step's seconds are remembered."""
        mean = sum(positions) / len(positions)
        return max(2 ** round(math.log2(max(mean, 1))), self.drafter.costs.context)

    def _note(self, alone: float, together: float) -> None:
        kind = _sureness(alone)
        self._extra[kind] += PATIENCE * (together - alone - self._extra[kind])
        self._idle = 0


def _sureness(expected: float) -> int:
    """How sure a copied draft is, in four classes, by the tokens a step makes with it."""
    return sum(expected > edge for edge in (1.05, 2.0, 4.0))
