"""The fused forward and its fallback against transformers' own model, prompts and trees alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hydra_core.base import Base, load_base, load_vocabulary
from hydra_core.base.fallback import TransformersDecoder
from hydra_core.base.fused import FusedDecoder
from hydra_core.decoding import Engine, naive_generate
from hydra_core.proposers import NgramDrafter
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree
from tests.tiny import make_config, make_tokenizer
from tests.trained import random_prompts

SMALL: dict[str, Any] = dict(vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, max_position_embeddings=128, eos_token_id=2, initializer_range=0.35)
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
MODELS: dict[str, tuple[Callable[[Any], Any], Any, type]] = {
    "tied": (LlamaForCausalLM, make_config(), FusedDecoder),
    "untied": (LlamaForCausalLM, make_config(tie_word_embeddings=False, num_key_value_heads=4), FusedDecoder),
    "llama3-rope": (LlamaForCausalLM, make_config(rope_parameters=LLAMA3_ROPE), FusedDecoder),
    "yarn-rope": (LlamaForCausalLM, make_config(rope_parameters=YARN_ROPE), FusedDecoder),
    "linear-rope": (LlamaForCausalLM, make_config(rope_parameters=LINEAR_ROPE), FusedDecoder),
    "dynamic-rope": (LlamaForCausalLM, make_config(rope_parameters=DYNAMIC_ROPE), TransformersDecoder),
    "wide-heads": (LlamaForCausalLM, make_config(head_dim=16, num_key_value_heads=1), FusedDecoder),
    "biased": (LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
               FusedDecoder),
    "mistral": (MistralForCausalLM, MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None), FusedDecoder),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL, num_key_value_heads=2), FusedDecoder),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16), FusedDecoder),
    "mistral-sliding": (MistralForCausalLM, MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=6),
                        TransformersDecoder),
    "qwen2-sliding": (Qwen2ForCausalLM, Qwen2Config(**SMALL, num_key_value_heads=2, use_sliding_window=True,
                                                    sliding_window=5, max_window_layers=1), TransformersDecoder),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=5,
                                                   layer_types=["sliding_attention", "full_attention"]),
               TransformersDecoder),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=5,
                                               layer_types=["sliding_attention", "full_attention"]), TransformersDecoder),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=288, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=2,
                                         initializer_range=0.35), TransformersDecoder),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SMALL), TransformersDecoder),
    "phi": (PhiForCausalLM, PhiConfig(**SMALL, partial_rotary_factor=0.5), TransformersDecoder),
}


@pytest.fixture(scope="module", params=list(MODELS))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, type]:
    build, config, decoder = MODELS[request.param]
    folder = tmp_path_factory.mktemp("model") / request.param
    torch.manual_seed(3)
    model = build(config)
    with torch.no_grad():  # biases and norms start as zeros and ones: what leaves them out would pass
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder, decoder


def load(folder: Path, **changes: Any) -> Base:
    return load_base(str(folder), dtype="fp32", cache=folder.parent / "cache", **changes)


@torch.inference_mode()
def reference(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([ids])).logits[0]


def test_prompts_of_different_lengths(saved: tuple[Path, type]) -> None:
    folder, decoder = saved
    base = load(folder)
    assert type(base.decoder) is decoder
    prompts = [list(prompt) for prompt in random_prompts(5, seed=4)]
    for prompt, hidden in zip(prompts, base.hidden_states(prompts), strict=True):
        torch.testing.assert_close(base.logits(hidden), reference(folder, prompt), atol=2e-4, rtol=2e-4)


@torch.inference_mode()
def test_greedy_answers_are_transformers_own(saved: tuple[Path, type], caplog: pytest.LogCaptureFixture) -> None:
    folder, decoder = saved
    with caplog.at_level("WARNING", "hydra_core"):
        base = load(folder)
    told = [record.message for record in caplog.records if "transformers' own forward" in record.message]
    assert len(told) == (decoder is TransformersDecoder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for number, prompt in enumerate(random_prompts(3, seed=6)):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=2,
                                pad_token_id=2)[0, len(prompt):].tolist()
        assert list(naive_generate(base, Request(str(number), prompt, 12, stop_ids=(2,))).token_ids) == wanted


def test_drafts_may_overshoot_the_context(saved: tuple[Path, type]) -> None:
    """Nodes past the last position can never be kept, and must not end the step either."""
    folder, _ = saved
    base = load(folder, context_limit=128)
    request = Request("long", tuple([9, 8] * 58), 100, stop_ids=())
    result = Engine(base, NgramDrafter(min_match=1), max_batch_size=1).generate([request])[0]
    assert result.finish_reason == "context" and result.token_ids == naive_generate(base, request).token_ids


def test_every_node_of_a_tree_sees_its_own_path(saved: tuple[Path, type]) -> None:
    folder, _ = saved
    base = load(folder)
    tree = DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0)))
    forest = tree.as_batch
    prompts = [list(prompt) for prompt in random_prompts(3, seed=5)]
    cache = base.allocate(3, 64)
    base.prefill(prompts, cache, (0, 3))
    tokens = torch.randint(3, 259, (3, forest.size), generator=torch.Generator().manual_seed(1))
    logits = base.logits(base.forward(tokens, cache, (0, 3), forest))
    for row, prompt in enumerate(prompts):
        for node in range(forest.size):
            path = [int(tokens[row, other]) for other in range(forest.size) if forest.ancestors[0, node, other]]
            wanted = reference(folder, prompt + path)[-1]
            torch.testing.assert_close(logits[row, node], wanted, atol=2e-4, rtol=2e-4)


def test_only_the_ends_of_the_model(saved: tuple[Path, type]) -> None:
    """What a trainer loads is what the whole base has."""
    folder, _ = saved
    base, ends = load(folder), load_vocabulary(str(folder), dtype="fp32", cache=folder.parent / "cache")
    assert ends.identity == base.identity and ends.stop_ids == base.stop_ids == (2,)
    assert torch.equal(ends.embedding, base.vocabulary.embedding)
    assert torch.equal(ends.norm_weight, base.vocabulary.norm_weight) and ends.norm_eps == base.vocabulary.norm_eps
    assert torch.equal(ends.head.weight, base.vocabulary.head.weight)
    states = torch.randn(3, ends.width)
    assert torch.equal(ends.head(states), base.logits(states))  # bias, scale and soft cap too


def test_both_decoders_agree(tiny_base_dir: Path) -> None:
    fused, plain = load(tiny_base_dir), load(tiny_base_dir, fused=False)
    assert type(plain.decoder) is TransformersDecoder
    prompts = [list(prompt) for prompt in random_prompts(4, seed=6)]
    for ours, theirs in zip(fused.hidden_states(prompts), plain.hidden_states(prompts), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_long_prompt_goes_through_in_chunks(tiny_base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(tiny_base_dir)
    prompts = [list(range(3, 60)), list(range(50, 60))]
    whole = base.hidden_states(prompts)
    monkeypatch.setattr("hydra_core.base.model.PREFILL_CHUNK", 16)
    for wanted, found in zip(whole, base.hidden_states(prompts), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "jamba", "deepseek"])
def test_models_without_keys_and_values_decode_plainly(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / kind
    torch.manual_seed(0)
    if kind == "mamba":
        MambaForCausalLM(MambaConfig(vocab_size=288, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=2,
                                     initializer_range=0.5)).save_pretrained(folder)
    elif kind == "deepseek":
        DeepseekV3ForCausalLM(DeepseekV3Config(
            **SMALL, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8)).save_pretrained(folder)
    else:
        JambaForCausalLM(JambaConfig(**SMALL, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
                                     expert_layer_period=9, expert_layer_offset=8, num_experts=2, mamba_d_state=4,
                                     use_mamba_kernels=False, pad_token_id=0)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    base = load(folder, context_limit=64)
    assert "decodes plainly" in caplog.text and not base.supports_tree
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    requests = [Request(f"r{i}", prompt, 8, stop_ids=()) for i, prompt in enumerate(random_prompts(5, seed=2))]
    engine = Engine(base, NgramDrafter(), max_batch_size=2)
    assert "without the drafter" in caplog.text
    for result, request in zip(engine.generate(requests), requests, strict=True):
        wanted = model.generate(torch.tensor([request.prompt_ids]), max_new_tokens=8, do_sample=False, eos_token_id=None,
                                pad_token_id=0)
        assert result.token_ids == tuple(wanted[0, len(request.prompt_ids):].tolist())
        assert naive_generate(base, request).token_ids == result.token_ids
