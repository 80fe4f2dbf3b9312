"""Dynamic trees: each step decides whether to draft with copied text, earlier answers, heads, all or nothing, and how many
nodes to verify."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hydra_core.base.kv_cache import KVCache
from hydra_core.heads import HeadDrafter
from hydra_core.proposers.acceptance import AcceptanceEstimator, Bools, Floats, Ints, match_class
from hydra_core.proposers.base import Accepted, Proposal, StepTimes
from hydra_core.proposers.calibration import CostCalibrator
from hydra_core.proposers.candidate_tree import CandidateTrees, CopiedChains, merge_copied, merge_suffix
from hydra_core.proposers.head_features import HeadFeatures
from hydra_core.proposers.ngram import NgramIndex
from hydra_core.proposers.node_budget import DynamicTrees, NodeSelection, prune, select_equal_budget, select_shared_budget
from hydra_core.proposers.plain import PlainProposer
from hydra_core.proposers.settings import AdaptiveDrafter
from hydra_core.proposers.suffix import SuffixTexts, SuffixTrees
from hydra_core.proposers.suffix_index import SuffixIndex
from hydra_core.sampling.sampler import Sampler, rank_scores

WIDTH = 6
"""Candidates taken below a node."""
BEAM = 4
"""Nodes of one depth that are expanded."""
MOST_NODES = 48
"""Most nodes of a sequence, whatever they cost."""
SLOPE_NODES = 8
"""Nodes per sequence from which on the cost of a node is read from a table: below, the noise of the table is larger."""
DEEPER_SHARE = 0.6
"""Share of the accepted paths that one more head is assumed to lengthen, when it is decided whether to run it."""
RETRY_STEPS = 24
"""After this many steps without heads in one situation they are tried there again."""
GAIN_WEIGHT = 0.1
"""Weight of a new step in the moving average of what heads gain."""
COPIED_EDGES = (1.05, 1.5, 2.0, 3.0, 4.5)
"""Classes of copied text by its expected tokens per step and sequence: the more they are, the less heads add."""
CLEAR_GAIN, UNCLEAR_STEPS, CLEAR_STEPS = 1.3, 16, 128
"""Where drafting is expected to make fewer than `CLEAR_GAIN` times a plain step's tokens per second, one step in
`UNCLEAR_STEPS` is a plain one, elsewhere one in `CLEAR_STEPS`: only plain steps tell what a plain step takes."""
FIRST_PLAIN = 0.75
"""Share of the way to the next plain step that is covered at the start: the first plain step comes early."""
INITIAL_GAIN = 1.3
"""Assumed gain of heads before any step used them, so that they are tried."""


def most_nodes(drafter: AdaptiveDrafter) -> int:
    """Nodes of the largest tree that can be drafted: as many as were timed, and no more than the drafter can fill."""
    limit = min(MOST_NODES, drafter.costs.most_nodes)
    if drafter.heads is None:
        copied, earlier = drafter.ngram.length if drafter.ngram else 0, drafter.suffix.nodes if drafter.suffix else 0
        return min(limit, 1 + copied + earlier)
    return limit


@dataclass(frozen=True)
class PredictedCost:
    """What the cost table predicts for a step of sequences at `positions`, in seconds: of a plain step, what its nodes add, and
    drafting with heads (0 without heads)."""

    positions: Sequence[int]
    plain: float
    nodes: float
    drafting: float


class DynamicTreeProposer(PlainProposer):
    """Trees of the nodes that make the most tokens per second, by learned acceptance and measured costs.

    `rows`, `slots`: of the KV cache; `ragged`: see `Base.ragged`; `answers`: where finished answers are kept. Heads run on the
    base's device; what follows from their candidates is decided on the host, in small arrays for which a GPU would only wait.
    """

    def __init__(self, drafter: AdaptiveDrafter, rows: int, slots: int, shared_noise: bool = True,
                 device: torch.device | str = "cpu", ragged: bool = False, answers: SuffixIndex | None = None) -> None:
        self.drafter, self.shared_noise, self.ragged = drafter, shared_noise, ragged
        self.max_nodes = most_nodes(drafter)
        heads = drafter.heads
        self.depths = heads.num_heads if heads is not None else 0
        self.indexes = [NgramIndex(drafter.ngram) for _ in range(rows)] if drafter.ngram else []
        self.texts = SuffixTexts(drafter.suffix, rows, answers) if drafter.suffix else None
        self.device = torch.device(device) if heads is None else heads.weight.device
        if heads is not None:
            heads.pack()
            self.inputs = HeadFeatures(heads, rows, slots)
            self.draft_ids = heads.draft_vocab.ids.to(self.device)
        self.acceptance = AcceptanceEstimator(self.depths, rows)
        self.calibrator = CostCalibrator()
        self._seconds: dict[tuple[int, int], Floats] = {}        # by batch size and rounded context
        self._head_gains: dict[tuple[int, int], float] = {}      # by situation, see `_update_head_gain`
        self._to_plain: dict[int, float] = {}   # by rounded batch size: share of the way to the next plain step
        self._without_heads: dict[tuple[int, int], int] = {}     # steps since the latest one with heads, by situation
        self._latest: tuple[DynamicTrees, PredictedCost] | None = None

    @property
    def features(self) -> Tensor:
        """[R, D], what the heads read for each row, pending hidden states included."""
        self.inputs.catch_up()
        return self.inputs.features

    @property
    def kv_caches(self) -> tuple[KVCache, ...]:
        return self.inputs.kv_caches if self.drafter.heads is not None else ()

    def catch_up(self, row: int) -> None:
        if self.drafter.heads is not None:
            self.inputs.catch_up()

    # -- what is remembered of sequences -------------------------------------------------------------------------------

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        self.acceptance.reset(row)
        if self.drafter.ngram is not None:
            self.indexes[row] = NgramIndex(self.drafter.ngram)
            self.indexes[row].extend(prompt_ids)
        if self.texts is not None:
            self.texts.admit(row, prompt_ids)
        if self.drafter.heads is not None:
            self.inputs.clear(row)

    def adopt(self, row: int, prompt_ids: Sequence[int], tokens: Sequence[int]) -> bool:
        self.admit(row, prompt_ids)
        self._extend(row, tokens)
        return self.drafter.heads is None or self.inputs.prefix is None

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        if self.drafter.heads is not None:
            self.inputs.copy_prefix(source, target, count)

    def commit(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor, tokens: Sequence[Sequence[int]] = ()) -> None:
        if self.drafter.heads is not None:
            self.inputs.commit(rows, hidden, counts)
        for row, chosen in enumerate(tokens, start=rows[0]):
            self._extend(row, chosen)

    def _extend(self, row: int, tokens: Sequence[int]) -> None:
        if self.indexes:
            self.indexes[row].extend(tokens)
        if self.texts is not None:
            self.texts.extend(row, tokens)

    def end(self, row: int) -> None:
        if self.texts is not None:
            self.texts.end(row)

    def move(self, source: int, target: int) -> None:
        self.acceptance.move(source, target)
        if self.indexes:
            self.indexes[target] = self.indexes[source]
        if self.texts is not None:
            self.texts.move(source, target)
        if self.drafter.heads is not None:
            self.inputs.move(source, target)

    def feedback(self, accepted: Accepted, times: StepTimes, kept: Sequence[bool] | None = None) -> None:
        if self._latest is None:
            return
        drafted, cost = self._latest
        if kept is not None:
            drafted, cost = self._without_dropped(drafted, cost, np.array(kept))
        if drafted.kinds.shape[1] > 1:
            self._learn_acceptance(drafted, accepted)
        self.calibrator.update(len(cost.positions), cost.plain, cost.nodes, times.verify + times.accept + times.commit)
        if cost.drafting > 0:
            self.calibrator.update_drafting(cost.drafting, times.draft)

    def _without_dropped(self, drafted: DynamicTrees, cost: PredictedCost, kept: Bools) -> tuple[DynamicTrees, PredictedCost]:
        """The step as it was: of sequences that `kept` [B] leaves out only the roots were verified."""
        kinds = np.where(kept[:, None], drafted.kinds, -1)
        nodes = cost.nodes if not self.ragged else self._predict(cost.positions, (drafted.tokens >= 0) & (
            kept[:, None] | (np.arange(kinds.shape[1]) == 0)), cost.drafting).nodes
        return replace(drafted, kinds=kinds), replace(cost, nodes=nodes)

    def _learn_acceptance(self, drafted: DynamicTrees, accepted: Accepted) -> None:
        kinds = drafted.kinds
        rows, kept = np.arange(len(kinds))[:, None], np.zeros(kinds.shape, dtype=np.bool_)
        kept[rows, accepted.path.cpu().numpy()] = True
        parents = drafted.trees.parents.numpy().clip(0)
        learned = kinds >= 0
        self.acceptance.update(kinds, learned & kept[rows, parents], learned & kept)

    # -- one draft -----------------------------------------------------------------------------------------------------

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        sampled = np.array([sampler.request.temperature > 0 for sampler in samplers])
        batch, drafting, roots_alone = len(positions), 0.0, CandidateTrees.roots(roots.cpu().numpy())
        if self._to_plain.get(batch.bit_length(), 0.0) >= 1:
            return self._proposal(roots_alone, self._plain_selection(positions), positions, 0.0)
        copied, earlier = self._copied(batch), self.texts.draft(batch, self.max_nodes - 1) if self.texts is not None else None
        candidates = self._merged(roots_alone, copied, earlier, sampled)
        selection = self._select(candidates, positions, self.drafter.costs.draft_seconds(batch, 0))
        where = _situation(batch, selection)
        if self.drafter.heads is not None and self._heads_pay(where):
            without = selection
            candidates, drafting = self._expand(self.drafter.heads, roots_alone, positions, samplers, sampled, without.gain)
            candidates = self._merged(candidates, copied, earlier, sampled)
            selection = self._select(candidates, positions, drafting)
            self._update_head_gain(where, selection.gain / without.gain)
        else:
            self._without_heads[where] = self._without_heads.get(where, 0) + 1
        return self._proposal(candidates, selection, positions, drafting)

    def _plain_selection(self, positions: Sequence[int]) -> NodeSelection:
        """The roots alone: a plain step."""
        batch, seconds = len(positions), float(self._base_seconds(positions)[0])
        return NodeSelection(np.ones((batch, 1), dtype=np.bool_), 1.0, batch / seconds, seconds)

    def _proposal(self, candidates: CandidateTrees, selection: NodeSelection, positions: Sequence[int],
                  drafting: float) -> Proposal:
        """The selected nodes; what `feedback` needs to know of the step is kept."""
        drafted = prune(candidates, selection)
        self._latest = drafted, self._predict(positions, selection.kept, drafting)
        size = len(positions).bit_length()
        if drafted.trees.size == 1:
            self._to_plain[size] = 0.0
        else:
            clear = selection.gain > CLEAR_GAIN * self._plain_selection(positions).gain
            self._to_plain[size] = self._to_plain.get(size, FIRST_PLAIN) + 1 / (CLEAR_STEPS if clear else UNCLEAR_STEPS)
        return Proposal(torch.tensor(drafted.tokens, device=self.device), drafted.trees, selection.seconds)

    def _copied(self, batch: int) -> CopiedChains | None:
        """The continuation that the text of each sequence suggests, or None where no sequence finds a match."""
        if self.drafter.ngram is None:
            return None
        length = min(self.drafter.ngram.length, self.max_nodes - 1)
        found = [index.match(length) for index in self.indexes[:batch]]
        if length < 1 or not any(match.matched for match in found):
            return None
        tokens = np.array([match.tokens or (-1,) * length for match in found])
        return CopiedChains(tokens, np.array([match_class(match.matched) for match in found]))

    def _merged(self, trees: CandidateTrees, copied: CopiedChains | None, earlier: SuffixTrees | None,
                sampled: Bools) -> CandidateTrees:
        """`trees` with what the text and earlier answers suggest."""
        if copied is not None:
            trees = merge_copied(trees, copied, self.acceptance, sampled)
        return trees if earlier is None else merge_suffix(trees, earlier, self.acceptance, sampled)

    def _expand(self, heads: HeadDrafter, roots: CandidateTrees, positions: Sequence[int], samplers: Sequence[Sampler],
                sampled: Bools, gain: float) -> tuple[CandidateTrees, float]:
        """Candidates of every head, where the most probable nodes of a depth are expanded, and the predicted seconds of
        drafting them.

        `gain`: tokens per second without heads. A node below one that is too improbable to be verified is more improbable
        still: such paths are not expanded.
        """
        self.inputs.catch_up()
        batch, costs = len(positions), self.drafter.costs
        rows, features = np.arange(batch)[:, None], self.inputs.features[:batch]
        floor = gain * self._seconds_of_a_node(positions)
        at = np.zeros_like(roots.tokens)                                        # [B, W] nodes that may be expanded
        going, probs = at == 0, roots.path_probs                                # [B, W] which are, and how probable they are
        path, seconds = self._embedded(heads, roots.tokens[going]), costs.draft_seconds(batch, 1)   # [P, depth + 1, D]
        first, columns = 1, []
        for depth in range(self.depths):
            whose = going.nonzero()[0]
            tokens, given = self._candidates(heads, depth, features, path, whose, positions, samplers)
            kinds = self.acceptance.head_kinds(depth, given, sampled[whose])    # [P, width]
            spread = [np.full((*going.shape, kinds.shape[1]), -1) for _ in range(2)]
            spread[0][going], spread[1][going] = tokens, kinds
            below = (probs * going)[..., None] * self.acceptance.probabilities(spread[1].clip(0))
            tokens, kinds, below = (part.reshape(batch, -1) for part in (*spread, below))   # [B, W * width]
            width = tokens.shape[1] // at.shape[1]
            columns.append((tokens, at.repeat(width, axis=1), kinds, below))
            if depth + 1 == self.depths:
                break
            best = (-below).argsort(axis=1, kind="stable")[:, :BEAM]
            probs = below[rows, best]
            now = (probs > floor) & (tokens[rows, best] >= 0)
            price = costs.deeper_seconds(now.sum() / BEAM, depth + 1)
            if not DEEPER_SHARE * probs[now].sum() > price * self.calibrator.drafting * gain:
                break
            seconds += price
            at, first = first + best, first + below.shape[1]
            places = np.full(going.shape, -1)
            places[going] = np.arange(len(path))
            above = path[torch.tensor(places[rows, best // width][now], device=self.device)]
            path = torch.cat((above, self._embedded(heads, tokens[rows, best][now])), dim=1)
            going = now
        tokens, parents, kinds, below = (np.concatenate(parts, 1) for parts in zip(*columns, strict=True))
        return roots.extended(tokens, parents, kinds, below, len(columns)), seconds

    def _embedded(self, heads: HeadDrafter, tokens: Ints) -> Tensor:
        """Paths of one token each: [P, 1, D] on the heads' device, of `tokens` [P] on the host."""
        return heads.embed(torch.tensor(tokens, device=self.device))[:, None]

    def _candidates(self, heads: HeadDrafter, depth: int, features: Tensor, path: Tensor, whose: Ints,
                    positions: Sequence[int], samplers: Sequence[Sampler]) -> tuple[Ints, Floats]:
        """Tokens [P, width] below paths [P, depth + 1, D] and the head's probabilities of them, on the host; `whose`: [P], the
        sequence of each path."""
        batch = len(features)
        if not heads.config.sequential:  # the path makes no difference: once for each sequence
            own, whose = whose, np.arange(batch)
            path = features.new_zeros(batch, depth + 1, 0)
        elif len(whose) != batch or depth:
            features = features[torch.tensor(whose, device=self.device)]
        if not self.shared_noise or not any(sampler.request.temperature for sampler in samplers):
            indices, values = heads.candidates(depth, features, path[:, None], WIDTH)
        else:
            token_positions = [position + depth + 1 for position in positions]
            logits = rank_scores(heads.candidate_logits(depth, features, path[:, None]), token_positions, samplers,
                                 self.draft_ids, torch.tensor(whose, device=self.device))
            values, indices = logits.softmax(-1).topk(min(WIDTH, logits.shape[-1]), dim=-1)
        tokens, probs = self.draft_ids[indices[:, 0]].cpu().numpy(), values[:, 0].cpu().double().numpy()
        return (tokens, probs) if heads.config.sequential else (tokens[own], probs[own])

    # -- expected gain -------------------------------------------------------------------------------------------------

    def _select(self, candidates: CandidateTrees, positions: Sequence[int], drafting: float) -> NodeSelection:
        """The nodes to verify; `drafting`: seconds of drafting by the table."""
        seconds = self._base_seconds(positions) + drafting * self.calibrator.drafting
        if self.ragged:
            return select_shared_budget(candidates, seconds, self.max_nodes)
        return select_equal_budget(candidates, seconds)

    def _base_seconds(self, positions: Sequence[int]) -> Floats:
        """As `_verify_seconds`, corrected by what recent steps took."""
        seconds, (plain, nodes) = self._verify_seconds(positions), self.calibrator.factors(len(positions))
        corrected: Floats = plain * seconds[0] + nodes * (seconds - seconds[0])
        return corrected

    def _predict(self, positions: Sequence[int], verified: Bools, drafting: float) -> PredictedCost:
        """`verified`: [B, M], the nodes of each sequence that are verified, its root among them."""
        seconds, counts = self._verify_seconds(positions), verified.sum(1)
        most = int(counts.sum()) - len(counts) if self.ragged else int(counts.max()) - 1
        return PredictedCost(positions, float(seconds[0]), float(seconds[most] - seconds[0]), drafting)

    def _verify_seconds(self, positions: Sequence[int]) -> Floats:
        """Seconds of the base's part of a step at `positions`: by nodes per sequence; for a ragged base by nodes of all
        sequences together beside the roots."""
        batch, context = len(positions), self._context(positions)
        seconds = self._seconds.get((batch, context))
        if seconds is None:
            # more nodes never take less time, whatever the noise of a table says
            seconds = np.maximum.accumulate(self.drafter.costs.verify_curve(batch, self.max_nodes, context))
            if self.ragged:  # linear between whole numbers of nodes per sequence
                nodes = 1 + np.arange(batch * (self.max_nodes - 1) + 1) / batch
                seconds = np.interp(nodes, np.arange(1, self.max_nodes + 1), seconds)
            self._seconds[batch, context] = seconds
        return seconds

    def _seconds_of_a_node(self, positions: Sequence[int]) -> float:
        """What a node of one sequence adds to a step, at the tree size at which it adds least."""
        seconds, rows = self._base_seconds(positions), len(positions) if self.ragged else 1
        least = max(min(SLOPE_NODES, self.max_nodes) - 1, 1) * rows
        more = (seconds - seconds[0])[least:]
        each = more / (least + np.arange(len(more)))
        return max(float(each.min(initial=np.inf)), 0.0) / (1 if self.ragged else len(positions))

    def _heads_pay(self, where: tuple[int, int]) -> bool:
        """Whether heads were faster than copied text alone in the situation `where`; from time to time they are tried there."""
        return self._without_heads.get(where, 0) >= RETRY_STEPS or self._head_gains.get(where, INITIAL_GAIN) > 1

    def _context(self, positions: Sequence[int]) -> int:
        """Mean committed tokens per sequence, rounded to a power of two and at least the context of the cost table: few
        different values, for each of which the seconds are kept."""
        mean = sum(positions) / len(positions)
        return max(1 << round(math.log2(max(mean, 1))), self.drafter.costs.context)

    def _update_head_gain(self, where: tuple[int, int], gain: float) -> None:
        """`gain`: expected tokens per second with heads over those without; of each situation a moving average is kept."""
        before = self._head_gains.get(where, INITIAL_GAIN)
        self._head_gains[where] = before + GAIN_WEIGHT * (gain - before)
        self._without_heads[where] = 0


def _situation(batch: int, copied: NodeSelection) -> tuple[int, int]:
    """The rounded batch size and the class of the copied drafts."""
    return batch.bit_length(), sum(copied.expected_tokens > edge for edge in COPIED_EDGES)
