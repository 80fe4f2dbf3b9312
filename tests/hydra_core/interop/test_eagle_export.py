"""EAGLE-3 folders: what another engine computes from the files is what the layer drafts here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hydra_core.base import Base, VocabHead
from hydra_core.errors import InputError
from hydra_core.heads import save_checkpoint
from hydra_core.heads.eagle import Eagle
from hydra_core.interop import export_to_vllm, serve_command
from hydra_core.interop.eagle_export import check_eagle3
from hydra_core.tree import default_trees
from tests.trained import random_heads


def eagle_of(base: Base, kind: str = "eagle3") -> Eagle:
    heads = random_heads(base, kind, draft_vocab_size=60, **({"taps": (1, 0, 1)} if kind == "eagle3" else {}))
    assert isinstance(heads, Eagle)
    for weight in heads.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return heads


def drafted_from_files(folder: Path, base: Base, taps: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] of a first step as vLLM's `llama_eagle3.py` computes them from the files, written out: taps [T, 3 * D] and
    the token after each position."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    heads, kv_heads, width = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weights[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T

    count = len(tokens)
    angles = torch.arange(count)[:, None] / config["rope_theta"] ** (torch.arange(0, width, 2) / width)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]

    def rope(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), -1) * sin

    fused = linear(taps, "fc")
    embedded = base.vocabulary.embedding[tokens]
    both = torch.cat((norm(embedded, "midlayer.input_layernorm"), norm(fused, "midlayer.hidden_norm")), -1)
    query, key, value = (linear(both, f"midlayer.self_attn.{name}_proj").view(count, -1, width) for name in "qkv")
    repeats = heads // kv_heads
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (rope(key), value))
    query, key, value = (part.transpose(0, 1) for part in (rope(query), key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    residual = fused + linear(mixed.transpose(0, 1).reshape(count, -1), "midlayer.self_attn.o_proj")
    inner = norm(residual, "midlayer.post_attention_layernorm")
    state = residual + linear(F.silu(linear(inner, "midlayer.mlp.gate_proj")) * linear(inner, "midlayer.mlp.up_proj"),
                              "midlayer.mlp.down_proj")
    logits = torch.full((count, config["vocab_size"]), float("-inf"))
    logits[:, torch.arange(config["draft_vocab_size"]) + weights["d2t"]] = linear(norm(state, "norm"), "lm_head")
    return logits


@torch.no_grad()
def test_the_files_draft_what_the_layer_drafts(tiny_base: Base, tmp_path: Path) -> None:
    heads, text = eagle_of(tiny_base), [5, 9, 200, 17, 33, 80, 6]
    save_checkpoint(tmp_path / "heads", heads, tiny_base.identity, default_trees(3), {})
    export = export_to_vllm(tmp_path / "heads", tiny_base.vocabulary, tmp_path / "deep-eagle3")
    hidden, length = tiny_base.hidden_states([text], heads.taps)[0], len(text)
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    made = heads.outputs(torch.tensor([text]), hidden[None], torch.arange(length)[None], mask, torch.ones(1, length))
    ours = torch.full((length - 1, 288), float("-inf"))
    ours[:, heads.draft_vocab.ids] = heads.draft_logits(made(0, torch.arange(length - 1), torch.empty(0)))
    theirs = drafted_from_files(export.folder, tiny_base, hidden[:-1, 32:], text[1:])
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    weights = load_file(export.folder / "model.safetensors")
    drafted = torch.arange(60) + weights["d2t"]
    assert drafted.tolist() == sorted(heads.draft_vocab.ids.tolist()) == weights["t2d"].nonzero()[:, 0].tolist()
    config = json.loads((export.folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLMEagle3"] and config["tie_word_embeddings"] is False
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == config["eagle_aux_hidden_state_layer_ids"] == [1, 0, 1]
    assert '"method": "eagle3"' in serve_command(export, "/models/mine")
    export_to_vllm(tmp_path / "heads", tiny_base.vocabulary, tmp_path / "deep-eagle3")  # replaces the earlier one


def test_what_the_layout_cannot_say_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kind=eagle: reads the last hidden state"):
        check_eagle3(eagle_of(tiny_base, "eagle"), tiny_base.vocabulary)
    vocabulary = tiny_base.vocabulary
    for head in (VocabHead(vocabulary.head.weight, torch.zeros(288)), VocabHead(vocabulary.head.weight, None, 1.0, 30.0)):
        with pytest.raises(InputError, match="a bias or a soft cap"):
            check_eagle3(eagle_of(tiny_base), type(vocabulary)(**{**vars(vocabulary), "head": head}))
