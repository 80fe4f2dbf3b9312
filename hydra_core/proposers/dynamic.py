"""Drafting that decides at every step: nothing, copied text, heads or both, and how many nodes, by expected gain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, NgramIndex
from hydra_core.proposers.acceptance import AcceptanceEstimator, Bools, Floats, Ints, match_class
from hydra_core.proposers.base import Accepted, PlainProposer, Proposal, StepTimes
from hydra_core.proposers.calibration import CostCalibrator
from hydra_core.proposers.growth import Candidates, Copied, Worth, add_copied, select, weigh_apart, weigh_together
from hydra_core.proposers.head_features import HeadFeatures
from hydra_core.sampling.sampler import Sampler, rank_scores

WIDTH = 6
"""Candidates taken from a node."""
BEAM = 4
"""Nodes of a depth that are drafted on."""
MOST_NODES = 48
"""Nodes of a row at most, whatever they cost."""
SOME_NODES = 8
"""Nodes a row from which on what a node costs is told from a measured table: between fewer the table's own noise is larger."""
COMES_TRUE = 0.6
"""Share of the paths that stand which one more head is thought to make longer, when it is asked whether it pays."""
RETRY_STEPS = 24
"""Steps after which heads that did not seem to pay are tried again."""
PATIENCE = 0.1
"""Weight of a new step in the running figures."""
SURENESS = (1.05, 1.5, 2.0, 3.0, 4.5)
"""Copied text is told apart by the tokens a row that a step makes with it: heads add the less the more those are."""
CLEAR, UNSURE_STEPS, SURE_STEPS = 1.3, 16, 128
"""Where drafting is thought to make less than `CLEAR` times a plain step's tokens a second, one step in so many is a plain one,
else one in so many more: what a plain step takes is known only from such."""
SOON = 0.75
"""The first of them comes after a quarter of those."""
GAIN_AT_FIRST = 1.3
"""How many times as fast a step with heads is thought to be before any was taken: they are tried."""


def most_nodes(drafter: AdaptiveDrafter) -> int:
    """Nodes of the largest tree that can be grown: as many as were timed, and no more than there is to draft."""
    limit = min(MOST_NODES, drafter.costs.most_nodes)
    if drafter.heads is None:
        return min(limit, drafter.ngram.length + 1 if drafter.ngram else 1)
    return limit


@dataclass(frozen=True)
class Foretold:
    """What the cost table says of a step of `batch` rows, in seconds: a plain one's, what its nodes add, and drafting with heads,
    0 without."""

    batch: int
    plain: float
    nodes: float
    drafting: float


class DynamicTreeProposer(PlainProposer):
    """Trees grown by learned chances and measured costs; see `growth` and `rates`.

    Heads run where the base does; what is made of their candidates is decided on the host, in small arrays that a GPU would
    only wait for. `ragged`: see `Base.ragged`.
    """

    def __init__(self, drafter: AdaptiveDrafter, rows: int, slots: int, shared_noise: bool = True,
                 device: torch.device | str = "cpu", ragged: bool = False) -> None:
        self.drafter, self.shared_noise, self.ragged = drafter, shared_noise, ragged
        self.max_nodes = most_nodes(drafter)
        heads = drafter.heads
        self.depths = heads.num_heads if heads is not None else 0
        self.indexes = [NgramIndex(drafter.ngram) for _ in range(rows)] if drafter.ngram else []
        self.device = torch.device(device) if heads is None else heads.weight.device
        if heads is not None:
            heads.pack()
            self.inputs = HeadFeatures(heads, rows, slots)
            self.draft_ids = heads.draft_vocab.ids.to(self.device)
        self.rates = AcceptanceEstimator(self.depths, rows)
        self._seconds: dict[tuple[int, int], Floats] = {}
        self._gains: dict[tuple[int, int], float] = {}  # speed of steps with heads over those without, see `_note`
        self.pace = CostCalibrator()
        self._foretold: Foretold | None = None  # of the step that is being taken
        self._drafted: dict[int, float] = {}    # by rough batch size: share of the way to the next plain step, see `CLEAR`
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

    def timed(self, times: StepTimes) -> None:
        told = self._foretold
        if told is None:
            return
        self.pace.learn(told.batch, told.plain, told.nodes, times.verify + times.accept + times.commit)
        if told.drafting > 0:
            self.pace.learn_drafting(told.drafting, times.draft)

    # -- one draft -----------------------------------------------------------------------------------------------------

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        sampled = np.array([sampler.request.temperature > 0 for sampler in samplers])
        batch, drafting, roots_alone = len(positions), 0.0, Candidates.roots(roots.cpu().numpy())
        if self._drafted.get(batch.bit_length(), 0.0) >= 1:
            return self._proposal(roots_alone, self._nothing(positions), positions, 0.0)
        copied = self._copied(batch)
        candidates = roots_alone if copied is None else add_copied(roots_alone, copied, self.rates, sampled)
        worth = self._weigh(candidates, positions, self.drafter.costs.draft_seconds(batch, 0))
        if self.drafter.heads is not None and self._heads_pay(batch, worth):
            alone = worth
            candidates, drafting = self._grow(self.drafter.heads, roots_alone, positions, samplers, sampled, alone)
            if copied is not None:
                candidates = add_copied(candidates, copied, self.rates, sampled)
            worth = self._weigh(candidates, positions, drafting)
            self._note(batch, alone, worth)
        else:
            self._idle += 1
        return self._proposal(candidates, worth, positions, drafting)

    def _nothing(self, positions: Sequence[int]) -> Worth:
        """A plain step."""
        batch, seconds = len(positions), float(self._base_seconds(positions)[0])
        return Worth(np.ones((batch, 1), dtype=np.bool_), 1.0, batch / seconds, seconds)

    def _proposal(self, candidates: Candidates, worth: Worth, positions: Sequence[int], drafting: float) -> Proposal:
        """The nodes that are worth it, and what is to be remembered of the step."""
        grown = select(candidates, worth)
        self._kinds = grown.kinds
        self._foretold = self._foretell(positions, worth, drafting)
        about = len(positions).bit_length()
        if grown.forest.size == 1:
            self._drafted[about] = 0.0
        else:
            steps = SURE_STEPS if worth.gain > CLEAR * self._nothing(positions).gain else UNSURE_STEPS
            self._drafted[about] = self._drafted.get(about, SOON) + 1 / steps
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

    def _grow(self, heads: HeadDrafter, known: Candidates, positions: Sequence[int], samplers: Sequence[Sampler],
              sampled: Bools, copied: Worth) -> tuple[Candidates, float]:
        """Candidates of every head, the likeliest nodes of a depth drafted on, and what drafting them is foretold to take.

        `copied`: what is made without them. A node below one that is too unlikely to be verified is less likely still: such
        paths are not drafted on.
        """
        self.inputs.catch_up()
        batch, costs = len(positions), self.drafter.costs
        rows, features = np.arange(batch)[:, None], self.inputs.features[:batch]
        floor = copied.gain * self._seconds_of_a_node(positions)
        at = np.zeros_like(known.tokens)                                        # [B, W] nodes that are drafted on
        going, chances = at == 0, known.chances                                 # [B, W] which of them are, and how likely
        path, seconds = self._embedded(heads, known.tokens[going]), costs.draft_seconds(batch, 1)   # [P, depth + 1, D]
        first, columns = 1, []
        for depth in range(self.depths):
            whose = going.nonzero()[0]
            tokens, given = self._candidates(heads, depth, features, path, whose, positions, samplers)
            kinds = self.rates.head_kinds(depth, given, sampled[whose])         # [P, width]
            made = [np.full((*going.shape, kinds.shape[1]), -1) for _ in range(2)]
            made[0][going], made[1][going] = tokens, kinds
            below = (chances * going)[..., None] * self.rates.chances(made[1].clip(0))
            tokens, kinds, below = (part.reshape(batch, -1) for part in (*made, below))     # [B, W * width]
            width = tokens.shape[1] // at.shape[1]
            columns.append((tokens, at.repeat(width, axis=1), kinds, below))
            if depth + 1 == self.depths:
                break
            best = (-below).argsort(axis=1, kind="stable")[:, :BEAM]
            chances = below[rows, best]
            now = (chances > floor) & (tokens[rows, best] >= 0)
            price = costs.deeper_seconds(now.sum() / BEAM, depth + 1)
            if not COMES_TRUE * chances[now].sum() > price * self.pace.drafting * copied.gain:
                break
            seconds += price
            at, first = first + best, first + below.shape[1]
            places = np.full(going.shape, -1)
            places[going] = np.arange(len(path))
            above = path[torch.tensor(places[rows, best // width][now], device=self.device)]
            path = torch.cat((above, self._embedded(heads, tokens[rows, best][now])), dim=1)
            going = now
        tokens, parents, kinds, below = (np.concatenate(parts, 1) for parts in zip(*columns, strict=True))
        return known.joined(tokens, parents, kinds, below, len(columns)), seconds

    def _embedded(self, heads: HeadDrafter, tokens: Ints) -> Tensor:
        """Paths of one token each: [P, 1, D] where heads run, of `tokens` [P] on the host."""
        return heads.embed(torch.tensor(tokens, device=self.device))[:, None]

    def _candidates(self, heads: HeadDrafter, depth: int, features: Tensor, path: Tensor, whose: Ints,
                    positions: Sequence[int], samplers: Sequence[Sampler]) -> tuple[Ints, Floats]:
        """Tokens [P, width] and the head's probabilities of them, on the host, below paths [P, depth + 1, D] of rows `whose`
        [P]."""
        batch = len(features)
        if not heads.config.sequential:  # what was drafted makes no difference: once for each row
            own, whose = whose, np.arange(batch)
            path = features.new_zeros(batch, depth + 1, 0)
        elif len(whose) != batch or depth:
            features = features[torch.tensor(whose, device=self.device)]
        if not self.shared_noise or not any(sampler.request.temperature for sampler in samplers):
            indices, values = heads.candidates(depth, features, path[:, None], WIDTH)
        else:
            standing = [position + depth + 1 for position in positions]
            logits = rank_scores(heads.candidate_logits(depth, features, path[:, None]), standing, samplers, self.draft_ids,
                                 torch.tensor(whose, device=self.device))
            values, indices = logits.softmax(-1).topk(min(WIDTH, logits.shape[-1]), dim=-1)
        tokens, chances = self.draft_ids[indices[:, 0]].cpu().numpy(), values[:, 0].cpu().double().numpy()
        return (tokens, chances) if heads.config.sequential else (tokens[own], chances[own])

    # -- what pays -----------------------------------------------------------------------------------------------------

    def _weigh(self, candidates: Candidates, positions: Sequence[int], drafting: float) -> Worth:
        """What of them pays, where drafting takes so many seconds by the table."""
        seconds = self._base_seconds(positions) + drafting * self.pace.drafting
        return weigh_apart(candidates, seconds, self.max_nodes) if self.ragged else weigh_together(candidates, seconds)

    def _base_seconds(self, positions: Sequence[int]) -> Floats:
        """As `_verify_seconds`, at the pace that steps go."""
        seconds, (plain, nodes) = self._verify_seconds(positions), self.pace.factors(len(positions))
        return plain * seconds[0] + nodes * (seconds - seconds[0])

    def _foretell(self, positions: Sequence[int], worth: Worth, drafting: float) -> Foretold:
        seconds, kept = self._verify_seconds(positions), worth.kept.sum(1)
        most = int(kept.sum()) - len(kept) if self.ragged else int(kept.max()) - 1
        return Foretold(len(positions), float(seconds[0]), float(seconds[most] - seconds[0]), drafting)

    def _verify_seconds(self, positions: Sequence[int]) -> Floats:
        """Seconds of the base's part of a step of rows that stand at `positions`, by nodes of every row, [most]; where the base
        packs, by nodes of all rows together beside the roots."""
        batch, context = len(positions), self._context(positions)
        known = self._seconds.get((batch, context))
        if known is None:
            # more nodes never take less, whatever the noise of a table says
            known = np.maximum.accumulate(self.drafter.costs.verify_curve(batch, self.max_nodes, context))
            if self.ragged:  # the costs are straight between whole nodes a row
                nodes = 1 + np.arange(batch * (self.max_nodes - 1) + 1) / batch
                known = np.interp(nodes, np.arange(1, self.max_nodes + 1), known)
            self._seconds[batch, context] = known
        return known

    def _seconds_of_a_node(self, positions: Sequence[int]) -> float:
        """What a node of one row adds to a step, where larger trees make it cheapest."""
        seconds, rows = self._base_seconds(positions), len(positions) if self.ragged else 1
        more = (seconds - seconds[0])[(SOME_NODES - 1) * rows:]
        each = more / ((SOME_NODES - 1) * rows + np.arange(len(more)))
        return max(float(each.min(initial=np.inf)), 0.0) / (1 if self.ragged else len(positions))

    def _heads_pay(self, batch: int, worth: Worth) -> bool:
        """Whether heads were faster than what is copied alone when that was as sure as now; now and then simply tried."""
        return self._idle >= RETRY_STEPS or self._gains.get(_situation(batch, worth), GAIN_AT_FIRST) > 1

    def _context(self, positions: Sequence[int]) -> int:
        """Committed tokens of a row in the mean, as the nearest power of two and no less than the costs tell apart: a few
        numbers, for which a step's seconds are remembered."""
        mean = sum(positions) / len(positions)
        return max(2 ** round(math.log2(max(mean, 1))), self.drafter.costs.context)

    def _note(self, batch: int, alone: Worth, together: Worth) -> None:
        """How many tokens a second are foretold with heads, over those without, where copied text is as sure as here."""
        where = _situation(batch, alone)
        known = self._gains.get(where, GAIN_AT_FIRST)
        self._gains[where] = known + PATIENCE * (together.gain / alone.gain - known)
        self._idle = 0


def _situation(batch: int, copied: Worth) -> tuple[int, int]:
    """About how many rows there are, and how sure their copied drafts."""
    return batch.bit_length(), sum(copied.expected > edge for edge in SURENESS)
