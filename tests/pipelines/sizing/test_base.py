"""Weights, keys and values by the formulas, against bases on disk, transformers' own classes and what an engine allocates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from hydra_core.base import EMBEDDED_BASE, Base
from hydra_core.decoding import Engine
from hydra_core.errors import InputError
from hydra_core.heads import HeadsConfig
from hydra_core.proposers.heads import HeadProposer
from hydra_core.tree import DraftTree, TreeSet
from pipelines.sizing.base import BaseShape, NotHere, gated_parameters, shape_from, shape_of
from pipelines.sizing.engines import engine_parts
from pipelines.sizing.heads import heads_shape
from tests.tiny import make_config, save_tiny
from tests.trained import random_heads

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 320}


def test_a_base_on_disk_has_the_parameters_and_bytes_of_its_files(tiny_base_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    """Exactly, but for the header of the file."""
    base = shape_of(str(tiny_base_dir), "fp32", None, tmp_path)
    on_disk = (tiny_base_dir / "model.safetensors").stat().st_size
    assert base.parameters == sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(tiny_base_dir).parameters())
    assert base.weight_bytes() == 4 * base.parameters and base.weight_bytes("bf16") == 2 * base.parameters
    assert 0 <= on_disk - base.weight_bytes() < 4096
    assert (base.width, base.vocab_size, base.limit) == (tiny_base.vocabulary.width, tiny_base.vocab_size, 256)
    assert base.vocabulary_bytes == tiny_base.vocabulary.embedding.nbytes  # tied


def test_a_configuration_alone_is_enough(tiny_base_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_base_dir / "config.json", tmp_path)
    alone, whole = (shape_of(str(folder), "bf16", 100, tmp_path) for folder in (tmp_path, tiny_base_dir))
    assert (alone.parameters, alone.kv_bytes, alone.limit) == (whole.parameters, whole.kv_bytes, 100) and alone.stored is None


@pytest.mark.parametrize("config", [
    LlamaConfig(**SHAPE), LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True), MistralConfig(**SHAPE, head_dim=8),
    Qwen2Config(**SHAPE), Qwen3Config(**SHAPE, head_dim=24)], ids=lambda config: config.model_type)
def test_parameters_of_a_shape_are_those_of_the_class(config: LlamaConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = sum(one.numel() for one in model.parameters())
    assert gated_parameters(config, bool(config.tie_word_embeddings)) == wanted == shape_from("x", config, "bf16").parameters


def test_another_architecture_is_counted_by_its_weights_or_its_class(tmp_path: Path) -> None:
    """Its configuration names its sizes otherwise."""
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=200, n_positions=64)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    wanted = sum(one.numel() for one in model.parameters())
    assert shape_of(str(tmp_path), "fp32", None, tmp_path).parameters == wanted
    (tmp_path / "model.safetensors").unlink()
    assert shape_of(str(tmp_path), "fp32", None, tmp_path).parameters == wanted


def test_the_embedded_base_is_known_before_it_is_fetched(tmp_path: Path) -> None:
    base = shape_of(EMBEDDED_BASE, "int4", None, tmp_path)
    assert base.parameters == 134_515_008 and base.kv_bytes == 2 * 30 * 3 * 64 * 2 and base.limit == 8192
    codes = base.layer_matrices / 2 + base.layer_matrices / 32 * 4
    assert base.weight_bytes() == 2 * base.parameters + codes
    assert base.read_bytes == 2 * (base.parameters - base.layer_matrices) + codes


def test_a_base_that_is_not_here_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for model, words in (("someone/not-here", "hf download someone/not-here config.json"), ("/nowhere", "not on this machine"),
                         (str(tmp_path / "x.gguf"), "no stage has unpacked yet")):
        with pytest.raises(NotHere, match=words):
            shape_of(model, "bf16", None, tmp_path)
    with pytest.raises(InputError, match=r"has no config\.json"):
        shape_of(str(tmp_path), "bf16", None, tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        shape_of(str(tmp_path), "bf16", None, tmp_path)


def test_the_text_part_of_a_larger_model_counts(tmp_path: Path) -> None:
    text = make_config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}), encoding="utf-8")
    assert shape_of(str(tmp_path), "fp32", None, tmp_path).width == 32


@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
def test_an_engine_allocates_the_bytes_of_keys_and_values(tiny_base: Base, kind: str) -> None:
    """Exactly: the base's cache, hidden states and the prefix layer's cache."""
    heads, rows = random_heads(tiny_base, kind), 3
    engine = Engine(tiny_base, heads, TreeSet({1: DraftTree(((0,), (0, 0)))}), max_batch_size=rows, draft_slots=64)
    proposer = engine.drafting.proposer
    assert isinstance(proposer, HeadProposer)
    held = engine.cache.nbytes + proposer.inputs.features.nbytes + proposer.inputs.pending.nbytes
    held += proposer.inputs.cache.nbytes if proposer.inputs.cache else 0
    base = shape_from("tiny", tiny_base.vocabulary.config, "fp32")
    parts = engine_parts(base, heads_shape(base, heads.config), rows, tiny_base.context_limit, slots=64)
    assert parts["keys and values"].low == held


def test_a_context_limit_never_exceeds_the_bases_own(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert [shape_of(str(tmp_path), "fp32", limit, tmp_path).limit for limit in (None, 100, 999)] == [256, 100, 256]


def test_what_a_configuration_leaves_out_is_read_off_the_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path, tie_word_embeddings=False)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    wanted = shape_of(str(tmp_path), "fp32", None, tmp_path)
    del values["tie_word_embeddings"], values["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    found = shape_of(str(tmp_path), "fp32", 128, tmp_path)
    assert not found.tied and not wanted.tied and found.parameters == wanted.parameters and found.limit == 128
    with pytest.raises(NotHere, match=r"set base\.context_limit"):
        shape_of(str(tmp_path), "fp32", None, tmp_path)


def test_layers_that_differ_count_with_the_largest_and_nonsense_is_told(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for change, wanted in (({"intermediate_size": [64, 128]}, 128), ({"num_attention_heads": "many", "head_dim": None}, None)):
        (tmp_path / "config.json").write_text(json.dumps(values | change), encoding="utf-8")
        if wanted is None:
            with pytest.raises(NotHere, match=r"config\.json is of a kind whose sizes are not known"):
                shape_of(str(tmp_path), "fp32", None, tmp_path)
        else:
            found = shape_of(str(tmp_path), "fp32", None, tmp_path)
            assert found.config.intermediate_size == wanted and heads_shape(found, HeadsConfig(kind="hydra++")).parameters


def test_a_converted_base_keeps_its_name(tiny_base_dir: Path, tmp_path: Path) -> None:
    """By which its measured steps are found."""
    shutil.copy(tiny_base_dir / "config.json", tmp_path)
    (tmp_path / "hydra_base.json").write_text(json.dumps({"name": "mine", "digest": "0"}), encoding="utf-8")
    assert shape_of(str(tmp_path), "fp32", None, tmp_path).name == "mine"


def test_an_untied_head_counts_twice() -> None:
    tied, untied = (shape_from("x", LlamaConfig(**SHAPE, tie_word_embeddings=value), "bf16") for value in (True, False))
    assert untied.parameters - tied.parameters == 320 * 64 and untied.vocabulary_bytes == 2 * tied.vocabulary_bytes
    assert isinstance(tied, BaseShape) and untied.multiplied == tied.multiplied
