"""Acceptance: a table of cases, and a comparison with a walk in plain Python."""

from __future__ import annotations

import random

import pytest
import torch

from hydra_core.decoding import accept, accept_walking
from hydra_core.decoding.verify import accept_on_device, accept_on_host
from hydra_core.sampling import Request, Sampler, Typical
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
