"""A draft model: what it drafts, what its cache holds after every step, and which models are refused."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from hydra_core.base import Base, load_base
from hydra_core.decoding import Engine, Result, naive_generate
from hydra_core.errors import InputError
from hydra_core.proposers import DraftModel, Growth
from hydra_core.proposers.draft_model import DraftModelProposer
from hydra_core.proposers.growing import Grown, Level, grow
from hydra_core.sampling import Request
from tests.tiny import make_tokenizer, save_tiny
from tests.trained import random_prompts

CHAIN = Growth(depth=4, beam=1, width=1, nodes=4, floor=0)


def test_a_draft_model_that_agrees_is_accepted_to_full_depth(tiny_base: Base) -> None:
    """The base drafts for itself: every step accepts the whole chain, also with the noise of sampling."""
    for temperature in (0.0, 0.8):
        requests = [Request(f"r{i}", prompt, 31, stop_ids=(), temperature=temperature, seed=i)
                    for i, prompt in enumerate(random_prompts(5, seed=2))]
        for result in Engine(tiny_base, DraftModel(tiny_base, CHAIN), max_batch_size=3).generate(requests):
            assert (result.steps, result.drafted, result.accepted) == (6, 24, 24)


def test_trees_are_accepted_more_often_than_chains(tiny_base: Base, tiny_draft: Base) -> None:
    requests = [Request(f"r{i}", prompt, 40, stop_ids=()) for i, prompt in enumerate(random_prompts(8, seed=3))]
    steps = {}
    for growth in (CHAIN, Growth(4, beam=3, width=3, nodes=12, floor=0)):
        results = Engine(tiny_base, DraftModel(tiny_draft, growth)).generate(requests)
        steps[growth.beam] = sum(result.steps for result in results)
    assert steps[3] < 0.9 * steps[1] and steps[1] < 0.8 * 8 * 39


def test_no_path_is_grown_below_the_floor(tiny_base: Base, tiny_draft: Base) -> None:
    requests = [Request("r", random_prompts(6, seed=3)[1], 40, stop_ids=())]
    drafted = [Engine(tiny_base, DraftModel(tiny_draft, Growth(5, 1, 1, 5, floor))).generate(requests)[0].drafted / 39
               for floor in (0.0, 0.2, 0.9)]
    assert drafted[0] > drafted[1] > drafted[2]


@pytest.mark.parametrize("growth", [CHAIN, Growth(4, 3, 3, 9, 0.0)], ids=["chain", "tree"])
def test_its_cache_is_that_of_the_text_after_every_step(tiny_base: Base, tiny_draft: Base, growth: Growth,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Rolled back to what was accepted, after rows moved, beside prompts in chunks, with copied prefixes and cancellations."""
    for name, value in (("BUSY_TOKENS", 24), ("IDLE_TOKENS", 60), ("CHUNK", 20), ("SHARED_TOKENS", 8)):
        monkeypatch.setattr(f"hydra_core.decoding.scheduler.{name}", value)
    engine, dice = Engine(tiny_base, DraftModel(tiny_draft, growth), max_batch_size=3), random.Random(1)
    long = tuple(range(3, 103))
    requests = [Request(f"r{i}", prompt, (9, 40, 21)[i % 3], stop_ids=(), temperature=(0.0, 0.9)[i % 2], seed=i,
                        speculate=i != 4)
                for i, prompt in enumerate([*random_prompts(6, seed=1), long, (*long, 7), (*long[:60], 9)])]
    waiting, results, read = list(requests), dict[str, Result](), 0
    proposer = engine.proposer
    assert isinstance(proposer, DraftModelProposer)
    while waiting or engine.has_work:
        if waiting and dice.random() < 0.5:
            engine.add(waiting.pop(0))
        if dice.random() < 0.02:
            engine.cancel("r5")
        results.update({output.id: output.result for output in engine.step() if output.result})
        for row, sequence in enumerate(engine.scheduler.decoding):
            text = [*sequence.request.prompt_ids, *sequence.tokens]
            assert proposer.texts[row] == text and proposer.cached[row] == int(proposer.cache.lengths[row]) < len(text)
            fresh = tiny_draft.allocate(1, len(text))
            tiny_draft.prefill([text[:proposer.cached[row]]], fresh, (0, 1)) if proposer.cached[row] else None
            torch.testing.assert_close(proposer.cache.keys[:, row, :proposer.cached[row]],
                                       fresh.keys[:, 0, :proposer.cached[row]], atol=1e-3, rtol=1e-3)
            read += proposer.cached[row]
    assert read > 2000 and sum(result.accepted for result in results.values()) > 60
    for request in requests:
        if results[request.id].finish_reason != "cancelled":
            assert results[request.id].token_ids == naive_generate(tiny_base, request).token_ids


def test_other_sizes_of_the_vocabulary_draft_too(tiny_base: Base, tmp_path: Path) -> None:
    """Families pad their vocabularies differently: ids past the base's are not drafted, ids past the draft model's not read."""
    requests = [Request(f"r{i}", (*prompt, 287), 20) for i, prompt in enumerate(random_prompts(4, seed=5))]
    for size in (270, 320):
        folder = save_tiny(tmp_path / str(size), seed=1, vocab_size=size)
        draft = load_base(str(folder), dtype="fp32", cache=tmp_path / "cache")
        for request, result in zip(requests, Engine(tiny_base, DraftModel(draft)).generate(requests), strict=True):
            assert result.token_ids == naive_generate(tiny_base, request).token_ids and result.drafted > 0


def test_models_that_cannot_draft_are_refused(tiny_base: Base, tiny_draft: Base, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    MambaForCausalLM(MambaConfig(vocab_size=288, hidden_size=16, num_hidden_layers=2, state_size=4,
                                 eos_token_id=2)).save_pretrained(tmp_path / "mamba")
    make_tokenizer().save_pretrained(tmp_path / "mamba")
    recurrent = load_base(str(tmp_path / "mamba"), dtype="fp32", cache=tmp_path / "cache", context_limit=64)
    with pytest.raises(InputError, match="draft model mamba: keeps a state that cannot be rolled back"):
        Engine(tiny_base, DraftModel(recurrent))
    monkeypatch.setattr(tiny_draft, "tokenizer", SimpleNamespace(
        get_vocab=lambda: {token: number + 1 for token, number in tiny_base.tokenizer.get_vocab().items()}))
    with pytest.raises(InputError, match="259 of the base's 259 tokens have other ids there"):
        Engine(tiny_base, DraftModel(tiny_draft))
    monkeypatch.setattr(tiny_draft, "device", torch.device("meta"))
    with pytest.raises(InputError, match="is on meta, the base on cpu"):
        Engine(tiny_base, DraftModel(tiny_draft))


def test_sizes_that_make_no_tree_are_refused() -> None:
    for wrong in ({"depth": 0}, {"beam": 0}, {"width": 0}, {"nodes": 0}, {"floor": 1.0}, {"floor": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            Growth(**wrong)  # type: ignore[arg-type]


def scripted(tables: list[Any]) -> tuple[torch.Tensor, Any, list[Level]]:
    """A drafter whose logits are given for each level, which keeps the levels that it was asked for."""
    levels: list[Level] = []

    def expand(level: Level) -> torch.Tensor:
        levels.append(level)
        return torch.tensor(tables[len(levels)]).log()

    return torch.tensor(tables[0]).log(), expand, levels


def test_the_most_probable_paths_are_expanded_and_verified() -> None:
    """Two of three candidates are expanded; a candidate deep in the tree may be more probable than one at its top."""
    first, expand, levels = scripted([[[[0.6, 0.3, 0.1, 0.0]]], [[[0.1, 0.0, 0.9, 0.0], [0.5, 0.25, 0.25, 0.0]]],
                                      [[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]]])

    def rank(logits: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
        best = logits.softmax(-1).topk(3, dim=-1)
        return best.indices, best.values

    grown: Grown = grow(Growth(depth=3, beam=2, width=3, nodes=5, floor=0), first, rank, expand)
    assert [level.tokens.tolist() for level in levels] == [[[0, 1]], [[2, 0]]]
    assert levels[1].above.tolist() == [[0, 1]] and (levels[0].written, levels[1].written) == (0, 2)
    assert levels[1].trees.depths.tolist() == [[0, 0, 1, 1]]
    assert levels[1].trees.ancestors[0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    proposal = grown.proposal(torch.tensor([7]), 5)
    # 0 (0.6), 0-2 (0.54), 0-2-0 (0.54), 1 (0.3), 1-0 (0.15) before 1-0-3 (0.15) and 2 (0.1)
    assert proposal.tokens.tolist() == [[7, 0, 1, 2, 0, 0]]
    assert proposal.trees.parents.tolist() == [[-1, 0, 0, 1, 2, 3]] and proposal.trees.depth == 3
    assert grown.written_paths([[0, 2, 0]]) == [[0, 2]], "the last one was not expanded"
    assert grown.written_paths([[1, 0]]) == [[1, 3]] and grown.written_paths([[2, 0]]) == grown.written_paths([[3]]) == [[]]
