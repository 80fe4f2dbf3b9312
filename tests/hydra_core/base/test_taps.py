"""Taps are transformers' own `hidden_states`, on every path of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from hydra_core.base import Base, load_base
from hydra_core.base.fallback import TransformersDecoder
from hydra_core.base.fused import FusedDecoder
from hydra_core.base.graphs import GraphedForward
from hydra_core.base.sequential import SequentialDecoder
from hydra_core.base.taps import check_taps
from hydra_core.errors import InputError
from hydra_core.tree import DraftTree
from hydra_core.tree.batch import chain
from tests.tiny import make_config, make_tokenizer
from tests.trained import random_prompts

TAPS = (2, 0, 3)
"""In another order than the layers'."""
SMALL: dict[str, Any] = dict(vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                             max_position_embeddings=128, eos_token_id=2, initializer_range=0.35)
MODELS: dict[str, tuple[Any, Any, dict[str, Any], type]] = {
    "native": (LlamaForCausalLM, make_config(num_hidden_layers=4), {}, FusedDecoder),
    "operators": (LlamaForCausalLM, make_config(num_hidden_layers=4), {"native": False}, FusedDecoder),
    "transformers": (LlamaForCausalLM, make_config(num_hidden_layers=4), {"fused": False}, TransformersDecoder),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=5,
                                               layer_types=["sliding_attention", "full_attention"] * 2), {},
               TransformersDecoder),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=288, n_embd=32, n_layer=4, n_head=4, n_positions=128, eos_token_id=2,
                                         initializer_range=0.35), {}, TransformersDecoder),
    "mamba": (MambaForCausalLM, MambaConfig(vocab_size=288, hidden_size=32, num_hidden_layers=4, state_size=8, eos_token_id=2,
                                            initializer_range=0.35), {"context_limit": 128}, SequentialDecoder),
}


@pytest.fixture(scope="module", params=list(MODELS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Base]:
    build, config, changes, decoder = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model") / request.param
    torch.manual_seed(3)
    build(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    base = load_base(str(folder), dtype="fp32", cache=folder.parent / "cache", **changes)
    assert type(base.decoder) is decoder
    return folder, base


@torch.inference_mode()
def reference(folder: Path, ids: list[int]) -> list[torch.Tensor]:
    """transformers' hidden states at the end and at the taps, [T, D] each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [found[-1][0], *(found[tap][0] for tap in TAPS)]


def test_prompts_of_different_lengths(made: tuple[Path, Base]) -> None:
    folder, base = made
    prompts = [list(prompt) for prompt in random_prompts(5, seed=4)]
    plain = base.hidden_states(prompts)
    for prompt, hidden, alone in zip(prompts, base.hidden_states(prompts, TAPS), plain, strict=True):
        assert hidden.shape == (len(prompt), 4 * 32)
        torch.testing.assert_close(hidden[:, :32], alone, atol=0, rtol=0)
        for part, wanted in zip(hidden.split(32, dim=-1), reference(folder, prompt), strict=True):
            torch.testing.assert_close(part, wanted, atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_trees_of_ragged_rows(made: tuple[Path, Base]) -> None:
    """Every real node's taps are those of its own path; a base that pads nothing is given fewer nodes of the second row."""
    folder, base = made
    if not base.supports_tree:
        pytest.skip("no tree")
    tree = DraftTree(((0,), (1,), (0, 0), (1, 0), (0, 0, 0)))
    prompts = [list(prompt) for prompt in random_prompts(2, seed=6)]
    cache = base.allocate(2, 64)
    base.prefill(prompts, cache, (0, 2))
    tokens = torch.randint(3, 259, (2, tree.size), generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([tree.size, 3]) if base.ragged else None
    hidden = base.forward(tokens, cache, (0, 2), tree.as_batch, counts, TAPS)
    above = tree.as_batch.ancestors[0]
    for row, prompt in enumerate(prompts):
        for node in range(tree.size if counts is None else int(counts[row])):
            path = prompt + tokens[row, above[node]].tolist()
            for part, wanted in zip(hidden[row, node].split(32), reference(folder, path), strict=True):
                torch.testing.assert_close(part, wanted[-1], atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_recorded_steps_give_taps(made: tuple[Path, Base]) -> None:
    _, base = made
    if not isinstance(base.decoder, FusedDecoder):
        pytest.skip("only the fused decoder is recorded")
    cache = base.allocate(2, 64)
    base.prefill([[5, 6, 7], [8, 9]], cache, (0, 2))
    ids = torch.tensor([[11, 12, 13], [14, 15, 16]])
    wanted = base.forward(ids, cache, (0, 2), chain(3), None, TAPS)
    forward = GraphedForward(base, cache, 8, lambda run: run, TAPS)
    torch.testing.assert_close(forward(ids, chain(3), 3), wanted, atol=2e-4, rtol=2e-4)
    assert wanted.shape == (2, 3, 4 * 32)


@torch.inference_mode()
def test_a_tree_written_level_by_level_is_the_tree_at_once(made: tuple[Path, Base]) -> None:
    """Also where rows have different lengths: what a drafter does whose layers extend their cache by a level at a time."""
    _, base = made
    if not base.supports_tree:
        pytest.skip("no tree")
    trees = DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (1, 0, 0))).as_batch
    ids = torch.randint(3, 259, (2, trees.size), generator=torch.Generator().manual_seed(2))
    caches = [base.allocate(2, 64) for _ in range(2)]
    for cache in caches:
        base.prefill([[5, 6, 7, 8, 9], [8, 9]], cache, (0, 2))
    for rows in ((0, 2), (1, 2)):
        wanted = base.forward(ids[rows[0]:], caches[0], rows, trees)
        for start, stop in ((0, 3), (3, 6), (6, 8)):
            part = type(trees)(trees.parents[:, :stop], trees.depths[:, :stop], trees.ancestors[:, :stop, :stop], 3)
            found = base.forward(ids[rows[0]:, start:stop], caches[1], rows, part, written=start)
            torch.testing.assert_close(found, wanted[:, start:stop], atol=1e-5, rtol=1e-5)


def test_taps_outside_the_base_are_refused() -> None:
    check_taps((0, 3), 4)
    for wrong in (4, -1):
        with pytest.raises(InputError, match=f"taps: layer {wrong} is not among the 4"):
            check_taps((1, wrong), 4)
