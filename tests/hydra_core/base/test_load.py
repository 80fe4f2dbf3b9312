"""A folder that is not what it should be is refused with the name of what is wrong; nothing is drawn at random in silence."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydra_core.base import formats_of, load_base, load_vocabulary
from hydra_core.decoding import naive_generate
from hydra_core.errors import InputError
from hydra_core.sampling import Request
from tests.gguf_file import write_gguf
from tests.tiny import save_tiny

TENSOR = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tiny_base_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base_dir, tmp_path / "base")


def rewrite(folder: Path, **changed: torch.Tensor | None) -> None:
    """Write the weights again, without those that are None."""
    tensors = load_file(folder / "model.safetensors") | changed
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors",
              metadata={"format": "pt"})


def edit(path: Path, **changed: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")


def test_a_tensor_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    """transformers draws it at random: two loads would be two models."""
    rewrite(folder, **{TENSOR: None})
    with pytest.raises(InputError, match=rf"base\.model={folder}: the tensor {TENSOR} is in none of its \.safetensors files"):
        load_base(str(folder), dtype="fp32", cache=tmp_path)
    rewrite(folder, **{"model.layers.0.mlp.down_proj.weight": None})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj\.weight and 1 more"):
        load_base(str(folder), dtype="fp32", cache=tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, **{TENSOR: torch.zeros(32, 10)})
    with pytest.raises(InputError, match=rf"the tensor {TENSOR} has shape \[32, 10\], and \[32, 64\] by config\.json"):
        load_base(str(folder), dtype="fp32", cache=tmp_path)


def test_weights_that_lie_beside_the_models_own_are_not_read(folder: Path, tmp_path: Path) -> None:
    """A copy in another format, or another model's: heads would learn for another vocabulary than decodes."""
    other = save_tiny(tmp_path / "other", seed=1)
    shutil.copy(other / "model.safetensors", folder / "model_old.safetensors")
    loaded = load_base(str(folder), dtype="fp32", cache=tmp_path)
    ends = load_vocabulary(str(folder), dtype="fp32", cache=tmp_path)
    assert torch.equal(ends.embedding, loaded.vocabulary.embedding)
    assert torch.equal(ends.head.weight, loaded.vocabulary.head.weight)


def test_only_the_files_of_an_index_count(folder: Path, tmp_path: Path) -> None:
    tensors = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")  # float32
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    assert formats_of(str(folder), cache=tmp_path, device="cpu") == ("bf16",)


def test_an_answer_ends_where_settings_or_tokenizer_say(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The chat template closes turns with the tokenizer's token."""
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=0)
    with caplog.at_level(logging.WARNING):
        assert load_base(str(folder), dtype="fp32", cache=tmp_path).stop_ids == (0, 2)
    assert "token ids [0], its tokenizer at 2" in caplog.text
    assert load_vocabulary(str(folder), dtype="fp32", cache=tmp_path).stop_ids == (0, 2)
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=[0, 2])
    caplog.clear()
    assert load_base(str(folder), dtype="fp32", cache=tmp_path).stop_ids == (0, 2) and "tokenizer" not in caplog.text


@pytest.mark.parametrize("ends", [2, [2], [0, 2], [7, 9], 7])
def test_any_form_of_end_ids_is_the_same_for_all_doors(folder: Path, tmp_path: Path, ends: object) -> None:
    """A number or a list, with the tokenizer's own or without: 2 ends a turn in each."""
    edit(folder / "config.json", eos_token_id=ends)
    (folder / "generation_config.json").unlink()
    wanted = tuple(sorted({2, *(ends if isinstance(ends, list) else [ends])}))
    base = load_base(str(folder), dtype="fp32", cache=tmp_path)
    assert base.stop_ids == load_vocabulary(str(folder), dtype="fp32", cache=tmp_path).stop_ids == wanted
    first = naive_generate(base, Request("r", (5, 6, 7), 30, stop_ids=())).token_ids
    ending = (*base.stop_ids, first[4])
    assert naive_generate(base, Request("r", (5, 6, 7), 30, stop_ids=ending)).token_ids == first[:first.index(
        next(token for token in first if token in ending)) + 1]


def test_the_ends_of_a_gguf_file(tiny_base_dir: Path, tmp_path: Path) -> None:
    write_gguf(tiny_base_dir, tmp_path / "tiny.gguf")
    base = load_base(str(tmp_path / "tiny.gguf"), dtype="fp32", cache=tmp_path / "cache")
    assert base.tokenizer.eos_token_id == 2 and base.stop_ids == (2,)
    assert load_vocabulary(str(tmp_path / "tiny.gguf"), dtype="fp32", cache=tmp_path / "cache").stop_ids == (2,)


def test_a_folder_that_wants_code_of_its_own_is_refused_without_a_question(folder: Path, tmp_path: Path,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "mine.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    edit(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    with pytest.raises(InputError, match=rf"base\.model={folder}: its folder wants to run Python code of its own, which is"):
        load_base(str(folder), dtype="fp32", cache=tmp_path)
