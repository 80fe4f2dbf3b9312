"""The drafts themselves. Verification repairs bad ones, so no test of tokens sees them: only steps get fewer tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from hydra_core.base import Base
from hydra_core.decoding import Engine, Result
from hydra_core.heads import DraftVocab, HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.proposers.base import Accepted, Proposal, StepTimes
from hydra_core.proposers.dynamic import WIDTH, DynamicTreeProposer
from hydra_core.proposers.ngram import NgramIndex
from hydra_core.sampling import Request, Sampler
from hydra_core.sampling.noise import gumbel, position_key
from hydra_core.tree import DraftTree, TreeSet
from hydra_core.tree.costs import StepCosts
from tests.steady import recorded_proposals
from tests.trained import overfit_heads, random_heads, random_prompts

KINDS = ("medusa", "hydra", "hydra++")
TREE = DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)))
CHEAP = StepCosts({1: {1: 1.0, 32: 1.3}, 4: {1: 1.0, 32: 2.0}}, {1: {0: 0.0, 3: 0.05}})
SAMPLED: dict[str, Any] = {"temperature": 0.7, "seed": 3}


@pytest.fixture(scope="module")
def trained(tiny_base: Base) -> dict[str, HeadDrafter]:
    return {kind: overfit_heads(tiny_base, kind, random_prompts(6, seed=1)) for kind in KINDS}


def made(base: Base, heads: HeadDrafter, dynamic: bool, **limits: int) -> Engine:
    drafter: Drafter = AdaptiveDrafter(heads, None, CHEAP) if dynamic else heads
    return Engine(base, drafter, None if dynamic else TreeSet({1: TREE}), **limits)


def drafts_of(engine: Engine, requests: list[Request]) -> tuple[list[Result], list[tuple[Any, ...]]]:
    proposals = recorded_proposals(engine)
    results = engine.generate(requests)
    return results, [(texts, made.tokens.tolist(), made.trees.parents.tolist()) for texts, made in proposals]


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("kind", KINDS)
def test_places_in_the_draft_vocabulary_are_not_tokens(tiny_base: Base, trained: dict[str, HeadDrafter], kind: str, dynamic: bool,
                                                       settings: dict[str, Any]) -> None:
    """In whatever order the draft vocabulary lists its tokens, the same tokens are drafted and accepted."""
    order = torch.randperm(tiny_base.vocab_size, generator=torch.Generator().manual_seed(5))
    shuffled = trained[kind].with_draft_vocab(DraftVocab(order, tiny_base.vocab_size))
    requests = [Request(f"r{i}", prompt, 20, stop_ids=(), **settings) for i, prompt in enumerate(random_prompts(6, seed=1)[:3])]
    results, drafts = drafts_of(made(tiny_base, trained[kind], dynamic, max_batch_size=2), requests)
    others, other_drafts = drafts_of(made(tiny_base, shuffled, dynamic, max_batch_size=2), requests)
    assert drafts == other_drafts
    assert [(r.token_ids, r.accepted_lengths) for r in results] == [(r.token_ids, r.accepted_lengths) for r in others]
    assert sum(result.accepted for result in others) >= (15 if not settings else 3)


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_are_ranked_with_the_noise_of_their_own_position(tiny_base: Base, trained: dict[str, HeadDrafter], kind: str,
                                                                    dynamic: bool) -> None:
    """Below each node stand the tokens that head, temperature and the noise of the coming draw rank first, by a plain
    computation from the heads' outputs; greedy rows beside sampled ones have no noise."""
    heads, dice, deep = trained[kind], random.Random(1), 0
    engine = made(tiny_base, heads, dynamic, max_batch_size=3)
    requests = [Request(f"r{i}", prompt, 15, stop_ids=(), temperature=(0.8, 0.0, 1.2)[i], seed=i, choice=i)
                for i, prompt in enumerate(random_prompts(6, seed=1)[:3])]
    propose = engine.proposer.propose
    ids = torch.arange(tiny_base.vocab_size)

    def checked(roots: torch.Tensor, positions: list[int], samplers: list[Sampler]) -> Proposal:
        nonlocal deep
        features, proposal = engine.proposer.features.clone(), propose(roots, positions, samplers)  # type: ignore[attr-defined]
        parents = proposal.trees.parents.expand(len(roots), -1).tolist()
        for row, sampler in enumerate(samplers):
            tokens, seen = proposal.tokens[row].tolist(), dict[int, list[int]]()
            for node in range(1, len(tokens)):
                if tokens[node] >= 0:
                    seen.setdefault(parents[row][node], []).append(node)
            for parent, nodes in seen.items():
                path = [parent]
                while path[0]:
                    path.insert(0, parents[row][path[0]])
                embedded = heads.embed(torch.tensor([[tokens[node] for node in path]]))
                scores = heads.draft_logits(heads.head_hidden(len(path) - 1, features[row:row + 1], embedded))[0]
                request = sampler.request
                if request.temperature:
                    key = position_key(request.seed, positions[row] + len(path), request.choice)
                    scores = scores / request.temperature + gumbel([key], ids)[0]
                best = scores.topk(WIDTH).indices.tolist()
                if dynamic:
                    assert {tokens[node] for node in nodes} <= set(best)
                else:
                    assert [tokens[node] for node in nodes] == best[:len(nodes)]
                deep += len(path) > 1
        return proposal

    engine.proposer.propose = checked  # type: ignore[method-assign, assignment]
    dice.shuffle(requests)
    engine.generate(requests)
    assert deep >= 5  # how many depends on how long drafts take


def test_copied_text_is_each_sequences_own(tiny_base: Base) -> None:
    """Rows that are moved, re-used and cancelled, with chunks and shared prefixes: what is drafted is what the sequence's own
    text suggests, looked up from scratch."""
    dice, ngram, copied = random.Random(2), NgramDrafter(min_match=1, length=6), 0
    prompts = [tuple(dice.choice((5, 6, 7, 40 + i)) for _ in range(dice.randint(2, 50))) for i in range(20)]
    engine = Engine(tiny_base, AdaptiveDrafter(None, ngram, CHEAP), max_batch_size=4)
    proposals = recorded_proposals(engine)
    waiting = [Request(f"r{i}", prompt, dice.randint(4, 25), stop_ids=()) for i, prompt in enumerate(prompts)]
    while waiting or engine.has_work:
        if waiting and dice.random() < 0.7:
            engine.add(waiting.pop(0))
        if dice.random() < 0.05:
            engine.cancel(f"r{dice.randrange(20)}")
        engine.step()
    for texts, proposal in proposals:
        for text, tokens in zip(texts.values(), proposal.tokens.tolist(), strict=True):
            drafted = tuple(token for token in tokens[1:] if token >= 0)
            index = NgramIndex(ngram)
            index.extend(text)
            assert tokens[0] == text[-1] and drafted == index.match(len(drafted)).tokens[:len(drafted)]
            copied += len(drafted)
    assert copied > 100


def test_heads_that_are_always_wrong_are_asked_less_and_less(tiny_base: Base, trained: dict[str, HeadDrafter]) -> None:
    """Acceptance is learned from what is verified: useless drafts come early. Drafts that are accepted go on."""
    costs = StepCosts({1: {1: 1.0, 32: 2.5}}, {1: {0: 0.0, 3: 0.05}})
    prompts = random_prompts(6, seed=1)

    def sizes(heads: HeadDrafter) -> list[int]:
        engine = Engine(tiny_base, AdaptiveDrafter(heads, None, costs), max_batch_size=1)
        proposals = recorded_proposals(engine)
        engine.generate([Request(str(i), prompts[i % 6], 35, stop_ids=()) for i in range(8)])
        return [int((proposal.tokens >= 0).sum()) - 1 for _, proposal in proposals]

    wrong, right = sizes(random_heads(tiny_base, "hydra")), sizes(trained["hydra"])
    assert sum(wrong[:10]) > 5 and sum(wrong[-100:]) < 10
    assert sum(right[:10]) > 10 and sum(right[-50:]) > 50


def test_a_sequences_own_luck_moves_with_it_and_ends_with_it() -> None:
    """A row whose drafts were refused is taken over by one whose drafts were accepted, then by a new sequence."""
    proposer = DynamicTreeProposer(AdaptiveDrafter(None, NgramDrafter(min_match=1), CHEAP), 3, 200, ragged=True)
    samplers = [Sampler(Request(f"r{row}", (0,), 1), 300) for row in range(3)]
    for row in range(3):
        proposer.admit(row, [5, 6, 7] * 10)
    for _ in range(4):
        proposal = proposer.propose(torch.tensor([7, 7, 7]), [30] * 3, samplers)
        nodes = proposal.trees.size
        deepest = [0, nodes - 1, nodes - 1]  # row 0 is refused, the others are accepted
        paths = [[min(node, last) for node in range(nodes)] for last in deepest]
        proposer.feedback(Accepted(torch.tensor(paths), torch.tensor([last + 1 for last in deepest]), []),
                          StepTimes(verify=0.001))
    kinds = proposer.acceptance.copied_kinds(1, torch.tensor([0, 0, 0]).numpy(), torch.tensor([False] * 3).numpy())
    refused, accepted, _ = proposer.acceptance.probabilities(kinds)[:, 0].tolist()
    assert refused < 0.8 * accepted
    proposer.move(2, 0)
    assert proposer.acceptance.probabilities(kinds)[0, 0] == accepted
    proposer.admit(0, [1, 2, 3])
    fresh = proposer.acceptance.probabilities(kinds)[0, 0]
    assert refused < fresh < accepted
