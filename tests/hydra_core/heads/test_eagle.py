"""EAGLE layers: what they read while decoding is what they read in training, and what they learn is accepted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from hydra_core.base import Base, load_base
from hydra_core.base.graphs import GraphedForward
from hydra_core.decoding import Engine, naive_generate
from hydra_core.errors import InputError
from hydra_core.heads import HeadsConfig, build_drafter, load_checkpoint, save_checkpoint
from hydra_core.heads.eagle import Eagle, eagle_taps
from hydra_core.proposers import AdaptiveDrafter, Context
from hydra_core.proposers.eagle import EagleProposer
from hydra_core.sampling import Request, Sampler
from hydra_core.training.model import HeadTraining
from hydra_core.training.packing import FeatureRow, pack_rows
from hydra_core.training.ranks import rank_rows
from hydra_core.tree import PLAIN, TreeSet, default_trees
from hydra_core.tree.batch import chain
from tests.tiny import save_tiny
from tests.trained import draft_vocab_of, random_heads, random_prompts

KINDS = ("eagle", "eagle3")


def random_eagle(base: Base, kind: str, **fields: object) -> Eagle:
    """With weights that are zero at the start drawn too, so that attention and MLP take part."""
    heads = random_heads(base, kind, **fields)  # type: ignore[arg-type]
    assert isinstance(heads, Eagle)
    for weight in heads.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return heads


@torch.no_grad()
def teacher_forced(base: Base, heads: Eagle, text: list[int]) -> list[torch.Tensor]:
    """The states of every step from every position, after the last norm: [T, D] each."""
    length = len(text)
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    hidden = base.hidden_states([text], heads.taps)[0]
    made = heads.outputs(torch.tensor([text]), hidden[None], torch.arange(length)[None], mask, torch.ones(1, length))
    return [made(step, torch.arange(length), torch.empty(0)) for step in range(heads.num_heads)]


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_steps_while_decoding_are_those_of_training(tiny_base: Base, kind: str) -> None:
    """From every position of a text: the cache holds what the base's states gave, and each step extends it by its own."""
    heads, text = random_eagle(tiny_base, kind, num_heads=4), list(random_prompts(1, seed=3, longest=24)[0]) * 2
    wanted = teacher_forced(tiny_base, heads, text)
    hidden = tiny_base.hidden_states([text], heads.taps)[0]
    for at in range(len(text) - 5):
        cache = heads.layer.allocate(1, len(text))
        ids = torch.tensor([text[1:at + 2]])
        states = heads.layer.extend(heads.read(hidden[None, :at + 1]), heads.embed(ids), cache,
                                    cache.build_metadata((0, 1), chain(at + 1)))[:, -1:]
        cache.lengths += at + 1
        torch.testing.assert_close(heads.layer.norm(states)[0, 0], wanted[0][at], atol=1e-4, rtol=1e-4)
        for step in range(1, 4):
            token = torch.tensor([[text[at + 1 + step]]])
            metadata = cache.build_metadata((0, 1), chain(step), written=step - 1)
            states = heads.layer.extend(states, heads.embed(token), cache, metadata)
            torch.testing.assert_close(heads.layer.norm(states)[0, 0], wanted[step][at], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_layer_is_its_formula(tiny_base: Base) -> None:
    """The first step of EAGLE-3 as vLLM's `llama_eagle3.py` computes it, on a single token, where attention is its value."""
    heads = random_eagle(tiny_base, "eagle3", taps=(0, 1))
    taps, token, layer = torch.randn(2 * 32), 7, heads.layer
    hidden, alone = torch.cat((torch.randn(32), taps)).expand(1, 2, -1), torch.eye(2, dtype=torch.bool)[None, None]
    outputs = heads.outputs(torch.tensor([[5, token]]), hidden, torch.zeros(1, 2).long(), alone, torch.ones(1, 2))
    made = outputs(0, torch.tensor([0]), torch.empty(0))[0]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + heads.norm_eps).sqrt() * weight

    fused = layer.fc.weight @ taps
    embedded = tiny_base.vocabulary.embedding[token]
    both = torch.cat((norm(embedded, layer.input_norm.weight), norm(fused, layer.hidden_norm.weight)))
    value = (layer.qkv.weight @ both)[-2 * 8:].view(2, 1, 8).expand(2, 2, 8).reshape(-1)  # two key heads of width 8, in pairs
    residual = fused + layer.output.weight @ value
    gate, up = (layer.gate_up.weight @ norm(residual, layer.mlp_norm.weight)).chunk(2)
    state = residual + layer.down.weight @ (gate / (1 + (-gate).exp()) * up)
    torch.testing.assert_close(made, norm(state, layer.norm.weight), atol=1e-4, rtol=1e-4)


def test_an_untrained_layer_of_one_tap_is_the_hidden_state(tiny_base: Base) -> None:
    heads = random_heads(tiny_base, "eagle")
    assert isinstance(heads, Eagle)
    hidden = torch.randn(3, 32)
    assert torch.equal(heads.read(hidden), hidden)
    states = teacher_forced(tiny_base, heads, [5, 6, 7, 8])
    wanted = torch.nn.functional.rms_norm(tiny_base.hidden_states([[5, 6, 7, 8]])[0], (32,), eps=heads.norm_eps)
    torch.testing.assert_close(states[0], wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(states[2], wanted, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Four layers, so that three taps differ."""
    folder = save_tiny(tmp_path_factory.mktemp("deep"), num_hidden_layers=4)
    return load_base(str(folder), dtype="fp32", cache=folder / "cache")


@pytest.fixture(scope="module")
def trained(deep_base: Base) -> dict[str, Eagle]:
    """Trained by the trainer's own loss on the base's greedy answers, packed in lines."""
    found = {}
    for kind in KINDS:
        torch.manual_seed(0)
        config = HeadsConfig(kind=kind, num_heads=4, draft_vocab_size=0, head_decay=0.8)  # type: ignore[call-arg,arg-type]
        heads = build_drafter(config, deep_base.vocabulary, draft_vocab_of(deep_base))
        assert isinstance(heads, Eagle)
        rows = rows_of(deep_base, heads)
        packed, model = pack_rows(rows, 96), HeadTraining(heads, deep_base.vocabulary)
        optimizer = torch.optim.Adam(heads.parameters(), lr=4e-3)
        for _ in range(120):
            loss, _ = model(packed, torch.full((4,), 150.0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[kind] = heads.eval().requires_grad_(False)
    return found


def rows_of(base: Base, heads: Eagle) -> list[FeatureRow]:
    made = []
    for number, prompt in enumerate(random_prompts(6, seed=1)):
        text = [*prompt, *naive_generate(base, Request(str(number), prompt, 40, stop_ids=())).token_ids]
        made.append(FeatureRow(torch.tensor(text), len(prompt), base.hidden_states([text], heads.taps)[0].clone()))
    return made


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_learns_is_accepted(deep_base: Base, trained: dict[str, Eagle], kind: str, recorded: bool) -> None:
    heads = trained[kind]
    assert heads.taps == (() if kind == "eagle" else (2, 2, 1))
    requests = [Request(f"r{i}", prompt, 40, stop_ids=()) for i, prompt in enumerate(random_prompts(6, seed=1))]
    engine = Engine(deep_base, heads, max_batch_size=2)
    if recorded:
        engine.forward = GraphedForward(deep_base, engine.cache, engine.draft_slots, lambda run: run, heads.taps)
    results = engine.generate(requests)
    for request, result in zip(requests, results, strict=True):
        assert result.token_ids == naive_generate(deep_base, request).token_ids
    assert sum(len(result.token_ids) - 1 for result in results) > 2.2 * sum(result.steps for result in results)
    untrained = Engine(deep_base, random_heads(deep_base, kind)).generate(requests)
    assert sum(result.steps for result in results) < 0.6 * sum(result.steps for result in untrained)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_those_of_what_it_drafts(deep_base: Base, trained: dict[str, Eagle], kind: str) -> None:
    """The trainer's simulation sees the layer as decoding does: where the true token has rank 0 at a depth, the most probable
    path of the draft holds it."""
    heads, row = trained[kind], rows_of(deep_base, trained[kind])[2]
    ranks = rank_rows(heads, pack_rows([row])).ranks
    text, agreed = row.token_ids.tolist(), 0
    proposer = EagleProposer(heads, Context(1, 200, TreeSet({1: PLAIN})))
    proposer.growth = type(proposer.growth)(depth=4, beam=1, width=1, nodes=4, floor=0)
    with torch.inference_mode():
        for place, at in enumerate(range(row.prompt_tokens - 1, len(text) - 2)):
            proposer.admit(0, text[:at + 2])
            proposer.commit((0, 1), row.hidden[None, :at + 1], torch.tensor([at + 1]))
            tokens = proposer.propose(torch.tensor([text[at + 1]]), [at + 1], [Sampler(Request("r", (5,), 1), 288)]).tokens[0, 1:]
            for depth, token in enumerate(tokens.tolist()):
                if at + 2 + depth >= len(text):
                    break
                right = token == text[at + 2 + depth]
                assert right == (int(ranks[place, depth]) == 0), (at, depth)
                agreed += right
                if not right:
                    break
    assert agreed > 25


def test_a_smaller_draft_vocabulary_drafts_its_tokens_alone(deep_base: Base) -> None:
    heads = random_heads(deep_base, "eagle3", draft_vocab_size=40)
    allowed = set(heads.draft_vocab.ids.tolist())
    requests = [Request(f"r{i}", prompt, 20, temperature=i % 2, seed=i) for i, prompt in enumerate(random_prompts(4, seed=5))]
    engine = Engine(deep_base, heads, max_batch_size=2)
    propose, seen = engine.proposer.propose, set[int]()

    def watched(*given: object) -> object:
        proposal = propose(*given)  # type: ignore[arg-type]
        seen.update(proposal.tokens[:, 1:].flatten().tolist())
        return proposal

    engine.proposer.propose = watched  # type: ignore[method-assign,assignment]
    for request, result in zip(requests, engine.generate(requests), strict=True):
        assert result.token_ids == naive_generate(deep_base, request).token_ids
    assert seen and seen <= allowed


def test_checkpoints_keep_the_taps(deep_base: Base, trained: dict[str, Eagle], tmp_path: Path) -> None:
    for kind, heads in trained.items():
        save_checkpoint(tmp_path / kind, heads, deep_base.identity, default_trees(4), {})
        loaded = load_checkpoint(tmp_path / kind, deep_base.vocabulary).drafter
        assert isinstance(loaded, Eagle) and loaded.taps == heads.taps and loaded.config == heads.config
        assert all(torch.equal(one, loaded.state_dict()[name]) for name, one in heads.state_dict().items())


def test_which_layers_are_read() -> None:
    def of(**fields: object) -> HeadsConfig:
        return HeadsConfig.model_validate({"kind": "eagle3", **fields})

    assert eagle_taps(of(), 32) == (2, 16, 29) and eagle_taps(of(), 1) == (0, 0, 0)
    assert eagle_taps(of(taps=(5,)), 32) == (5,) and eagle_taps(of(kind="eagle"), 32) == eagle_taps(of(kind="hydra"), 32) == ()
    with pytest.raises(InputError, match="taps: layer 5 is not among the 4"):
        eagle_taps(of(taps=(1, 5)), 4)
    for wrong in ({"kind": "eagle", "taps": (1,)}, {"taps": ()}, {"taps": (-1,)}):
        with pytest.raises(ValidationError, match="taps"):
            of(**wrong)


def test_it_is_refused_in_trees_of_heads(tiny_base: Base) -> None:
    with pytest.raises(InputError, match="eagle heads grow trees of their own"):
        Engine(tiny_base, AdaptiveDrafter(random_heads(tiny_base, "eagle")))
    assert math.isclose(HeadsConfig(kind="eagle").head_decay, 1.0)  # type: ignore[call-arg]
