"""The node budget of a step: how many candidates, and which, make the most tokens per second.

The reranking phase of a dynamic tree (EAGLE-2, arXiv 2406.16858), where the number of nodes is not fixed but follows from the
cost of a step on this machine (as in Sequoia, arXiv 2402.12374): the expected gain is tokens per second, expected tokens of
the step over its predicted seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hydra_core.proposers.acceptance import Bools, Floats, Ints
from hydra_core.proposers.candidate_tree import CandidateTrees
from hydra_core.tree.batch import TreeBatch, chain


@dataclass(frozen=True)
class NodeSelection:
    """Which candidates are verified.

    `kept`: [B, M] bool, the root of each sequence among them; `expected_tokens`: of the step, per sequence; `gain`: expected
    tokens per second of all sequences; `seconds`: predicted time of the step.
    """

    kept: Bools
    expected_tokens: float
    gain: float
    seconds: float


def select_equal_budget(candidates: CandidateTrees, seconds: Floats) -> NodeSelection:
    """The most probable nodes of each sequence, the same number for all: for a base that pads every tree to the largest.

    `seconds`: predicted time of a step that verifies 1, 2, ... nodes per sequence, drafting included.
    """
    order = (-candidates.path_probs).argsort(axis=1, kind="stable")  # ties keep the parent
    most = min(len(seconds), order.shape[1])
    rows = np.arange(len(order))[:, None]
    best, expected, gain = _highest_gain(candidates.path_probs[rows, order[:, :most]].sum(0).cumsum(), seconds)
    kept = np.zeros(order.shape, dtype=np.bool_)
    kept[rows, order[:, :best + 1]] = True
    return NodeSelection(kept & (candidates.path_probs > 0), expected / len(order), gain, float(seconds[best]))


def select_shared_budget(candidates: CandidateTrees, seconds: Floats, most: int) -> NodeSelection:
    """The most probable nodes of all sequences together, at most `most` per sequence: for a base that pads nothing.

    A sequence whose text repeats itself gets a large tree beside sequences that get none. `seconds`: predicted time of a step
    that verifies 0, 1, ... nodes beside the roots, drafting included.
    """
    probs = candidates.path_probs
    if probs.shape[1] > most:
        least = np.sort(probs, axis=1)[:, -most, None]
        probs = np.where(probs >= least, probs, 0.0)  # ties stay for now
    probs, batch = probs[:, 1:], len(probs)
    order = (-probs.ravel()).argsort(kind="stable")[:len(seconds) - 1]
    expected = batch + np.concatenate(([0.0], probs.ravel()[order].cumsum()))
    best, tokens, gain = _highest_gain(expected, seconds)
    kept = np.zeros(candidates.path_probs.shape, dtype=np.bool_)
    kept[:, 0] = True
    drafts = np.zeros(probs.size, dtype=np.bool_)
    drafts[order[:best]] = True
    kept[:, 1:] = drafts.reshape(probs.shape) & (probs > 0)
    if probs.shape[1] >= most:
        kept &= kept.cumsum(1) <= most
    return NodeSelection(kept, tokens / batch, gain, float(seconds[best]))


def _highest_gain(expected: Floats, seconds: Floats) -> tuple[int, float, float]:
    """The place of the most tokens per second, the expected tokens there, and the tokens per second."""
    gains = expected / seconds[:len(expected)]
    best = int(gains.argmax())
    return best, float(expected[best]), float(gains[best])


@dataclass(frozen=True)
class DynamicTrees:
    """The nodes to verify: `tokens`, `kinds` [B, N] int64, -1 past a sequence's own nodes, and the shapes `trees`."""

    tokens: Ints
    kinds: Ints
    trees: TreeBatch


def prune(candidates: CandidateTrees, selection: NodeSelection) -> DynamicTrees:
    """The trees of the selected nodes."""
    counts = selection.kept.sum(1)
    nodes = int(counts.max())
    if nodes == 1:
        return DynamicTrees(candidates.tokens[:, :1], candidates.kinds[:, :1], chain(1))
    rows, kept = np.arange(len(counts))[:, None], (~selection.kept).argsort(axis=1, kind="stable")[:, :nodes]
    real = np.arange(nodes) < counts[:, None]
    place = np.zeros_like(candidates.parents)
    place[rows, kept] = np.arange(nodes)
    parents = np.where(real, place[rows, candidates.parents[rows, kept].clip(0)], 0)
    parents[:, 0] = -1
    return DynamicTrees(np.where(real, candidates.tokens[rows, kept], -1), np.where(real, candidates.kinds[rows, kept], -1),
                        TreeBatch.of(parents, min(candidates.depth, nodes - 1)))
