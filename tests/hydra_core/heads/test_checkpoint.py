"""Loading is strict: missing, extra, misshapen or truncated content, and another base, are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydra_core.base import Base, load_base
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import DRAFT_IDS, load_checkpoint, save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from tests.tiny import save_tiny
from tests.trained import random_heads

TREES = TreeSet({1: DraftTree(((0,), (1,), (0, 0))), 4: DraftTree(())})


@pytest.fixture
def folder(tiny_base: Base, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "heads", random_heads(tiny_base, "hydra++", draft_vocab_size=60), tiny_base.identity, TREES,
                    {"why": "test"})
    return tmp_path / "heads"


@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
def test_comes_back_as_it_was(tiny_base: Base, tmp_path: Path, kind: str) -> None:
    heads = random_heads(tiny_base, kind, draft_vocab_size=50)
    for _ in range(2):  # a second save replaces the first
        save_checkpoint(tmp_path / "h", heads, tiny_base.identity, TREES, {})
    loaded = load_checkpoint(tmp_path / "h", tiny_base.vocabulary)
    assert loaded.trees == TREES and loaded.drafter.config == heads.config
    assert torch.equal(loaded.drafter.draft_vocab.ids, heads.draft_vocab.ids)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.drafter.state_dict()[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["h"]  # nothing half-written is left
    assert "embed" not in " ".join(load_file(tmp_path / "h" / "model.safetensors"))


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    other = load_base(str(save_tiny(tmp_path / "other", seed=1)), dtype="fp32", cache=tmp_path)
    with pytest.raises(InputError, match="belong to base"):
        load_checkpoint(folder, other.vocabulary)


def test_the_digest_counts_and_the_name_does_not(folder: Path, tiny_base: Base) -> None:
    """The same base under another path or hub name is the same base; another one of the same name is not."""
    vocabulary = tiny_base.vocabulary
    renamed = replace(vocabulary, identity=replace(vocabulary.identity, name="elsewhere"))
    assert len(load_checkpoint(folder, renamed).drafter.draft_vocab) == 60
    other = replace(vocabulary, identity=replace(vocabulary.identity, digest="0" * 64))
    with pytest.raises(InputError, match="belong to base") as refused:
        load_checkpoint(folder, other)
    assert "0" * 16 in str(refused.value) and vocabulary.identity.digest[:16] in str(refused.value)


@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen", "no ids", "bad ids", "truncated", "absent"])
def test_broken_tensors(folder: Path, tiny_base: Base, fault: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "heads.0.norm.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["stranger"] = torch.zeros(2)
    elif fault == "misshapen":
        tensors[name] = torch.zeros(7)
    elif fault == "no ids":
        del tensors[DRAFT_IDS]
    elif fault == "bad ids":
        tensors[DRAFT_IDS] = torch.tensor([1, 1, 2])
    save_file(tensors, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "absent":
        path.unlink()
    words = {"missing": name, "extra": "stranger", "misshapen": "shape", "no ids": DRAFT_IDS, "bad ids": "distinct",
             "truncated": "truncated", "absent": "missing"}
    with pytest.raises(InputError, match=words[fault]) as caught:
        load_checkpoint(folder, tiny_base.vocabulary)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(("file", "change", "word"), [
    ("config.json", {"schema_version": 99}, "schema_version"), ("config.json", {"heads": {"kind": "eagle9"}}, "heads"),
    ("config.json", {"base": {}}, "digest"), ("tree.json", {"1": [[0, 0]]}, "parent"),
    ("tree.json", {"1": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]}, "heads")])
def test_broken_descriptions(folder: Path, tiny_base: Base, file: str, change: dict[str, object], word: str) -> None:
    path = folder / file
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change if file == "tree.json" else values | change), encoding="utf-8")
    with pytest.raises(InputError, match=word) as caught:
        load_checkpoint(folder, tiny_base.vocabulary)
    assert file in str(caught.value)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="JSON"):
        load_checkpoint(folder, tiny_base.vocabulary)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(folder, tiny_base.vocabulary)
