"""Acceptance: a table of cases, and a comparison with a walk in plain Python."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from hydra_core.decoding import accept, accept_walking
from hydra_core.decoding.verify import accept_on_device, accept_on_host
from hydra_core.sampling import Request, Sampler, Typical, sample
from hydra_core.sampling.sampler import token_logprob
from hydra_core.tree import TreeBatch, chain

BRANCHED = TreeBatch.single((-1, 0, 0, 1, 1, 3))


@pytest.mark.parametrize(("tokens", "chosen", "path", "emitted"), [
    ([9, 5, 6, 7, 8, 4], [1, 1, 1, 1, 1, 1], [0], [1]),                        # nothing drafted right
    ([9, 5, 6, 7, 8, 4], [6, 1, 2, 1, 1, 1], [0, 2], [6, 2]),                  # second child, a leaf
    ([9, 5, 6, 7, 8, 4], [5, 7, 0, 4, 0, 3], [0, 1, 3, 5], [5, 7, 4, 3]),      # to the bottom
    ([9, 5, 6, 7, 8, 4], [5, 8, 0, 4, 2, 3], [0, 1, 4], [5, 8, 2]),
    ([9, 5, 6, 7, 8, 4], [6, 7, 0, 4, 0, 3], [0, 2], [6, 0]),                  # right below a refused parent: not kept
    ([9, -1, -1, -1, -1, -1], [5, 0, 0, 0, 0, 0], [0], [5]),                   # nothing was filled
])
def test_cases(tokens: list[int], chosen: list[int], path: list[int], emitted: list[int]) -> None:
    for way in (accept, accept_on_host, accept_on_device):
        found = way(torch.tensor([tokens, tokens]), BRANCHED, torch.tensor([chosen, chosen]))
        for row in range(2):
            count = int(found.counts[row])
            assert found.path[row, :count].tolist() == path and found.emitted[row] == emitted


def test_equals_a_plain_walk() -> None:
    dice = random.Random(0)
    for _ in range(300):
        size = dice.randint(1, 12)
        parents = (-1, *(dice.randrange(node) for node in range(1, size)))
        depths = TreeBatch.single(parents).depths[0].tolist()
        tokens = [dice.randint(0, 3) for _ in range(size)]
        seen: dict[int, list[int]] = {}
        for node in range(1, size):  # siblings hold different tokens
            siblings = seen.setdefault(parents[node], [])
            tokens[node] = next((t for t in range(4) if t not in siblings), -1)
            siblings.append(tokens[node])
        chosen = [dice.randint(0, 3) for _ in range(size)]
        order = sorted(range(size), key=lambda node: (depths[node], node))
        place = {node: i for i, node in enumerate(order)}
        ordered = tuple(-1 if parents[n] < 0 else place[parents[n]] for n in order)
        trees = TreeBatch.single(ordered)
        tokens, chosen = [tokens[n] for n in order], [chosen[n] for n in order]
        path, node = [0], 0
        while True:
            step = [c for c in range(1, size) if ordered[c] == node and tokens[c] == chosen[node]]
            if not step:
                break
            node = step[0]
            path.append(node)
        found = accept(torch.tensor([tokens]), trees, torch.tensor([chosen]))
        assert found.path[0, :int(found.counts[0])].tolist() == path
        other = accept_on_device(torch.tensor([tokens]), trees, torch.tensor([chosen]))
        longest = found.path.shape[1]
        assert torch.equal(other.path[:, :longest], found.path) and torch.equal(other.counts, found.counts)
        assert longest == len(path) and bool((other.path[:, longest:] == path[-1]).all())
        assert other.emitted == found.emitted
        logits = torch.nn.functional.one_hot(torch.tensor([chosen]), 4).float()
        walked = accept_walking(torch.tensor([tokens]), trees, logits, [7], [Sampler(Request("r", (1,), 9), 4)])
        assert torch.equal(walked.path, found.path) and torch.equal(walked.counts, found.counts)
        assert walked.emitted == found.emitted


def test_chain_of_one() -> None:
    found = accept(torch.tensor([[3]]), chain(1), torch.tensor([[8]]))
    assert (found.counts.tolist(), found.emitted) == ([1], [[8]])


def test_typical_acceptance_follows_the_most_probable_child_above_the_bound() -> None:
    """Probabilities 0.5 and 0.3 are accepted, 0.05 is not; without the mode only the argmax is."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(1, 3, 4)
    trees = TreeBatch.single((-1, 0, 0))
    for drafted, stands in (((1, 3), 1), ((3, 1), 2), ((3, -1), 0), ((1, 2), 1)):
        tokens = torch.tensor([[0, *drafted]])
        lossy = Sampler(Request("r", (1,), 9, lossy_typical=Typical(threshold=0.2, alpha=0.9)), 4)
        found = accept_walking(tokens, trees, logits, [0], [lossy])
        assert int(found.path[0, -1]) == stands
        assert found.emitted[0] == ([drafted[stands - 1], 0] if stands else [0])
        exact = accept_walking(tokens, trees, logits, [0], [Sampler(Request("r", (1,), 9), 4)])
        assert exact.counts.tolist() == [1] and exact.emitted == [[0]]


def random_batch(dice: random.Random, rows: int, size: int, tokens: int) -> tuple[TreeBatch, list[list[int]]]:
    """Trees of one size, each row its own, and tokens of which siblings differ; -1 where no token is left."""
    parents = [[-1, *(dice.randrange(node) for node in range(1, size))] for _ in range(rows)]
    drafted = []
    for row in parents:
        free = [dice.sample(range(tokens), tokens) for _ in range(size)]
        drafted.append([dice.randrange(tokens), *((free[above].pop() if free[above] else -1) for above in row[1:])])
    return TreeBatch.of(np.array(parents), size - 1), drafted


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_trees_of_their_own_for_each_row(rows: int) -> None:
    """Both ways of acceptance against a walk from the root, where every row has another tree."""
    dice, longer = random.Random(rows), 0
    for _ in range(60):
        trees, drafted = random_batch(dice, rows, dice.randint(1, 9), 3)
        chosen = [[dice.randrange(3) for _ in row] for row in drafted]
        for way in (accept, accept_on_host, accept_on_device):
            found = way(torch.tensor(drafted), trees, torch.tensor(chosen))
            for row, parents in enumerate(trees.parents.tolist()):
                path = [0]
                while (below := [node for node in range(1, len(parents)) if parents[node] == path[-1]
                                 and drafted[row][node] == chosen[row][path[-1]]]):
                    path += below
                count = int(found.counts[row])
                assert found.path[row, :count].tolist() == path
                assert set(found.path[row, count - 1:].tolist()) == {path[-1]}
                assert found.emitted[row] == [chosen[row][node] for node in path]
                longer += len(path) > 2
    assert longer > 10 * rows


SETTINGS: list[dict[str, Any]] = [
    {}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.0, "seed": 6, "choice": 2, "logprobs": 3},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7}, {"temperature": 1.3, "seed": 7, "repetition_penalty": 2.0},
    {"logprobs": 0}, {"temperature": 0.9, "seed": 8, "top_k": 3}]


@pytest.mark.parametrize("listed", [True, False])
def test_a_walk_chooses_as_plain_decoding_does_at_each_node(listed: bool) -> None:
    """Noise of each position, penalties that count what was chosen before, log probabilities of the unprocessed logits: with
    the logits of every node at a place of its own, and with those of empty nodes left out."""
    dice, generator, tokens, longer = random.Random(2), torch.Generator().manual_seed(2), 6, 0
    for _ in range(40):
        trees, drafted = random_batch(dice, len(SETTINGS), 8, tokens)
        logits = torch.randn(len(SETTINGS), 8, tokens, generator=generator) * 1.5
        requests = [Request("r", (1, 2), 9, **settings) for settings in SETTINGS]
        positions = [dice.randint(3, 90) for _ in requests]
        lines, rows_of = None, logits
        if listed:
            places = iter(dice.sample(range(len(SETTINGS) * 8), len(SETTINGS) * 8))
            lines = [[next(places) for _ in row] for row in drafted]
            rows_of = torch.empty(len(SETTINGS) * 8, tokens)
            rows_of[torch.tensor(lines)] = logits
        found = accept_walking(torch.tensor(drafted), trees, rows_of, positions, [Sampler(r, tokens) for r in requests], lines)
        for row, (request, parents) in enumerate(zip(requests, trees.parents.tolist(), strict=True)):
            sampler, path, emitted, logprobs = Sampler(request, tokens), [0], [], []
            while True:
                here = logits[row, path[-1]]
                emitted.append(sample(here[None], [positions[row] + len(path)], [sampler])[0])
                sampler.record(emitted[-1])
                if request.logprobs is not None:
                    logprobs.append(token_logprob(here, emitted[-1], request.logprobs))
                below = [node for node in range(1, 8) if parents[node] == path[-1] and drafted[row][node] == emitted[-1]]
                if not below:
                    break
                path += below
            count = int(found.counts[row])
            assert found.path[row, :count].tolist() == path and found.emitted[row] == emitted
            assert found.logprobs[row] == logprobs
            longer += len(path) > 2
    assert longer > 20


@pytest.mark.parametrize(("threshold", "alpha"), [(0.09, 0.3), (0.9, 0.3), (0.9, 0.05), (0.9, 2.0)])
def test_the_bound_of_typical_acceptance_is_the_published_one(threshold: float, alpha: float) -> None:
    """A single drafted token, accepted where p > min(threshold, alpha exp(-entropy)); also at temperatures other than 1, and with
    tokens of which top-k leaves no probability."""
    generator, verdicts = torch.Generator().manual_seed(1), set()
    for trial in range(60):
        logits = torch.randn(1, 2, 8, generator=generator) * (0.3 + trial / 20)
        settings: dict[str, Any] = {"temperature": 0.8, "top_k": 5, "seed": trial} if trial % 2 else {"temperature": 1.0}
        sampler = Sampler(Request("r", (1,), 9, lossy_typical=Typical(threshold, alpha), **settings), 8)
        kept = sampler.process(logits[0, 0]).tolist()
        weights = [math.exp(score) for score in kept]
        p = [weight / sum(weights) for weight in weights]
        bound = min(threshold, alpha * math.exp(sum(chance * math.log(chance) for chance in p if chance)))
        drawn = sample(logits[0, :1], [3 + 1], [sampler])[0]
        for token in range(8):
            found = accept_walking(torch.tensor([[0, token]]), TreeBatch.single((-1, 0)), logits, [3], [sampler])
            assert int(found.counts[0]) == 1 + (p[token] > bound or token == drawn), (trial, token)
            assert found.emitted[0][0] == (token if p[token] > bound else drawn)
            verdicts.add(p[token] > bound)
    assert verdicts == {True, False} or threshold == 0.9 == alpha
