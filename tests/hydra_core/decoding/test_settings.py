"""Every setting of the engine, its drafters and a request does something: a changed one changes what can be observed."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import Engine
from hydra_core.errors import InputError
from hydra_core.heads import HeadDrafter, HeadsConfig, build_drafter
from hydra_core.proposers import AdaptiveDrafter, NgramDrafter, SuffixDrafter
from hydra_core.proposers.ngram import KEPT_ENDS, Match, NgramIndex
from hydra_core.sampling import Request, Typical
from hydra_core.tree import DraftTree, TreeSet
from hydra_core.tree.costs import StepCosts
from tests.steady import recorded_proposals
from tests.tiny import save_tiny
from tests.trained import draft_vocab_of, overfit_heads, random_heads, random_prompts

TREE = TreeSet({1: DraftTree(((0,), (1,), (0, 0)))})
PROMPT = random_prompts(6, seed=1)[2]
ALONE = Request("r", PROMPT, 24, temperature=0.9, seed=1, stop_ids=())
CHEAP = StepCosts({1: {1: 1.0, 32: 1.3}}, {1: {0: 0.0, 3: 0.05}})


@pytest.fixture(scope="module")
def heads(tiny_base: Base) -> HeadDrafter:
    return overfit_heads(tiny_base, "hydra", random_prompts(6, seed=1))


def observed(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """What a user sees of the answers, and what was drafted on the way."""
    proposals, texts, most = recorded_proposals(engine), {}, 0
    results = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            texts[output.id] = texts.get(output.id, ()) + output.token_ids
            if output.result is not None:
                results[output.id] = replace(output.result, prefill_seconds=0.0, decode_seconds=0.0)
        most = max(most, engine.running)
    return {"results": results, "texts": texts, "most": most,
            "drafts": [(texts, proposal.tokens.tolist()) for texts, proposal in proposals]}


def test_every_field_of_a_request(tiny_base: Base, heads: HeadDrafter) -> None:
    """Changed alone, beside what it needs; a field that is new has to be listed here."""
    def seen(request: Request) -> dict[str, Any]:
        return observed(Engine(tiny_base, heads, TREE, max_batch_size=2), [request])

    plain = seen(ALONE)
    assert plain == seen(ALONE)
    tokens = plain["results"]["r"].token_ids
    text = tiny_base.decode(tokens[4:6])
    changed: dict[str, Any] = {
        "id": "s", "prompt_ids": PROMPT[:-1], "max_new_tokens": 23, "temperature": 1.5, "seed": 2, "stop_ids": (tokens[9],),
        "stop": (text,),
        "choice": 1, "top_k": 2, "top_p": 0.2, "min_p": 0.5, "repetition_penalty": 3.0, "presence_penalty": 3.0,
        "frequency_penalty": 3.0, "logprobs": 2, "lossy_typical": Typical(0.01, 0.01), "speculate": False}
    recorded = seen(replace(ALONE, hidden_states=True))["results"]["r"].hidden
    assert recorded.shape == (len(PROMPT) + len(tokens), tiny_base.vocabulary.width)
    missing = {field.name for field in fields(Request)} - changed.keys() - {"hidden_states"}
    assert not missing, f"say here how a change of {missing} shows"
    for name, value in changed.items():
        assert seen(replace(ALONE, **{name: value})) != plain, f"{name} does nothing"
    for name in ("id", "logprobs", "lossy_typical", "speculate"):  # what such a change must leave alone, and where it shows
        other = seen(replace(ALONE, **{name: changed[name]}))["results"]["s" if name == "id" else "r"]
        assert name == "lossy_typical" or other.token_ids == tokens
        assert other.lossy == (name == "lossy_typical") and (other.logprobs is not None) == (name == "logprobs")
        assert (other.drafted == 0) == (name == "speculate")
    assert seen(replace(ALONE, stop_ids=(tokens[9],)))["results"]["r"].token_ids == tokens[:tokens.index(tokens[9]) + 1]
    typical = [seen(replace(ALONE, lossy_typical=Typical(*values))) for values in ((0.3, 1.0), (0.01, 1.0), (0.3, 0.01))]
    assert typical[0] != typical[1] and typical[0] != typical[2], "threshold or alpha does nothing"


def test_every_argument_of_the_engine(tiny_base: Base, heads: HeadDrafter, tmp_path: Path) -> None:
    requests = [replace(ALONE, id=f"r{i}", prompt_ids=prompt, seed=i) for i, prompt in enumerate(random_prompts(4, seed=1))]
    usual: dict[str, Any] = {"base": tiny_base, "drafter": heads, "trees": TREE, "max_batch_size": 3, "context_limit": None,
                             "shared_noise": True, "graphs": None}
    other = load_base(str(save_tiny(tmp_path / "other", seed=1)), dtype="fp32", cache=tmp_path)
    changed: dict[str, Any] = {"base": other, "drafter": random_heads(tiny_base, "hydra"),
                               "trees": TreeSet({1: DraftTree(((0,),))}),
                               "max_batch_size": 2, "context_limit": 20, "shared_noise": False}
    missing = {*inspect.signature(Engine).parameters} - changed.keys() - {"graphs", "draft_slots", "prefix_cache"}
    assert not missing, f"say here how a change of {missing} shows"
    plain = observed(Engine(**usual), requests)
    assert plain == observed(Engine(**usual), requests) and plain["most"] == 3
    for name, value in changed.items():
        with_it = observed(Engine(**usual | {name: value}), requests)
        assert with_it != plain, f"{name} does nothing"
        assert (with_it["texts"] == plain["texts"]) == (name in ("drafter", "trees", "max_batch_size", "shared_noise"))
    larger = TreeSet({1: DraftTree(((0,), (1,), (2,), (0, 0), (1, 0)))})
    Engine(**usual, draft_slots=8).prepare(heads, larger)
    with pytest.raises(InputError, match="6 nodes are more than the 4 that this engine has room for"):
        Engine(**usual).prepare(heads, larger)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="graphs"):
            Engine(**usual | {"graphs": True})


def test_every_setting_of_dynamic_drafting(tiny_base: Base, heads: HeadDrafter) -> None:
    greedy = replace(ALONE, temperature=0.0, prompt_ids=(5, 6, 7, 8, 5, 6, 9, 6, 7, 8, 5, 6), max_new_tokens=60)

    def seen(drafter: Any) -> dict[str, Any]:
        return observed(Engine(tiny_base, drafter, max_batch_size=1), [greedy])

    ngram = NgramDrafter(max_match=3, min_match=1, length=8)
    changed: dict[str, Any] = {"max_match": 2, "min_match": 3, "length": 3}
    assert changed.keys() == {field.name for field in fields(NgramDrafter)}
    plain = seen(AdaptiveDrafter(None, ngram, CHEAP))
    assert plain["drafts"] == seen(AdaptiveDrafter(None, ngram, CHEAP))["drafts"]
    for name, value in changed.items():
        other = replace(ngram, **{name: value})
        with_it = seen(AdaptiveDrafter(None, other, CHEAP))
        assert with_it["texts"] == plain["texts"]
        assert with_it["drafts"] != plain["drafts"] or looked_up(other) != looked_up(ngram), f"ngram.{name} does nothing"
    both = AdaptiveDrafter(heads, ngram, CHEAP)
    dear = StepCosts({1: {1: 1.0, 32: 90.0}}, {1: {0: 0.0, 3: 0.05}})
    others = {"heads": None, "ngram": None, "costs": dear, "suffix": SuffixDrafter()}
    assert others.keys() == {field.name for field in fields(AdaptiveDrafter)}
    plain = seen(both)
    for name, value in others.items():
        with_it = seen(replace(both, **{name: value}))
        assert with_it["drafts"] != plain["drafts"] and with_it["texts"] == plain["texts"], f"{name} does nothing"

    def seen_twice(suffix: SuffixDrafter) -> dict[str, Any]:
        engine = Engine(tiny_base, AdaptiveDrafter(None, None, CHEAP, suffix), max_batch_size=1)
        return observed(engine, [greedy, replace(greedy, id="again")])

    earlier = SuffixDrafter()
    kept: dict[str, Any] = {"length": 2, "nodes": 3, "max_tokens": 0}
    assert kept.keys() == {field.name for field in fields(SuffixDrafter)}
    plain = seen_twice(earlier)
    for name, value in kept.items():
        with_it = seen_twice(replace(earlier, **{name: value}))
        assert with_it["drafts"] != plain["drafts"] and with_it["texts"] == plain["texts"], f"suffix.{name} does nothing"


def looked_up(drafter: NgramDrafter) -> Match:
    """In a text where three tokens stood once, and the last two of them too often since for that place to be remembered."""
    index = NgramIndex(drafter)
    index.extend([5, 6, 7, 8, *[9, 6, 7] * (KEPT_ENDS + 1), 5, 6, 7])
    return index.match(drafter.length)


OF_TRAINING = {"loss", "hybrid_decay", "head_decay", "mask_lost"}
"""What the loss of a training reads, and heads that are made do not."""
OF_EAGLE = {"taps"}
"""What one kind alone knows: `tests/hydra_core/heads/test_eagle.py` shows what it changes."""


def test_every_field_of_the_heads_architecture(tiny_base: Base) -> None:
    """Each changes the tensors of the heads, or what they answer."""
    changed: dict[str, Any] = {"kind": "hydra++", "num_heads": 2, "num_blocks": 2, "draft_vocab_size": 40, "dropout": 0.5,
                               "normalise_embeddings": False, "final_norm": False, "mlp": "gated", "recurrent": True,
                               "skip_bias": True, "own_rows": True}
    missing = HeadsConfig.model_fields.keys() - changed.keys() - OF_TRAINING - OF_EAGLE
    assert not missing, f"say here how a change of {missing} shows"

    def seen(**fields: Any) -> tuple[Any, ...]:
        config = HeadsConfig.model_validate({"kind": "hydra", "num_heads": 3, "draft_vocab_size": 100} | fields)
        torch.manual_seed(0)
        made = build_drafter(config, tiny_base.vocabulary, draft_vocab_of(tiny_base, config.draft_vocab_size)).train()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            torch.manual_seed(1)
            path = made.embed(torch.tensor([[5, 6]]))
            answer = made.draft_logits(made.head_hidden(1, torch.randn(1, 32), path))
        return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}, answer.tolist()

    usual = seen()
    assert usual == seen()
    for name, value in changed.items():
        assert seen(**{name: value}) != usual, f"{name} does nothing"
