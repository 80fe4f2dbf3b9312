"""Published heads compute here what they compute there, and decode exactly; what would not is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hydra_core.base import Base
from hydra_core.decoding import Engine, naive_generate
from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab, HeadDrafter
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.interop import import_official
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from tests.official import (
    Tensors,
    hydra_config,
    hydra_logits,
    hydra_tensors,
    medusa_config,
    medusa_logits,
    medusa_tensors,
    our_logits,
    published,
    write,
)
from tests.trained import overfit_heads, random_prompts

TREES = TreeSet({1: DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))})
HYDRA = [{"heads": heads, "layers": layers, "prefix": prefix, "grounded": True}
         for heads, layers in ((1, 1), (3, 1), (4, 2), (2, 4)) for prefix in (False, True)]
UNGROUNDED = [{"heads": 3, "layers": layers, "grounded": False} for layers in (1, 3)]


def imported(base: Base, tmp_path: Path, tensors: Tensors, config: dict[str, Any], name: str = "hydra_lm_head.pt") -> HeadDrafter:
    import_official(write(tmp_path / "theirs", tensors, config, name), tmp_path / "ours", base.vocabulary, {"argv": []})
    return load_checkpoint(tmp_path / "ours", base.vocabulary).drafter


def text(base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [T] and the base's states [T, D] at them."""
    ids = torch.randint(3, 259, (14,))
    return ids, base.hidden_states([ids.tolist()])[0]


@pytest.mark.parametrize("fields", [*HYDRA, *UNGROUNDED], ids=str)
@pytest.mark.parametrize("name", ["hydra_lm_head.pt", "hydra_lm_head.safetensors"])
def test_hydra_computes_what_it_did(tiny_base: Base, tmp_path: Path, fields: dict[str, Any], name: str) -> None:
    """Hydra, Hydra++ with its layer, heads that read no tokens: the logits of every head at every position."""
    tensors, config = hydra_tensors(tiny_base, **fields), hydra_config(**fields)
    heads = imported(tiny_base, tmp_path, tensors, config, name)
    kind = "hydra++" if fields.get("prefix") else "hydra" if fields["grounded"] else "medusa"
    assert (heads.config.kind, heads.num_heads, heads.config.num_blocks) == (kind, fields["heads"], fields["layers"])
    assert heads.config.own_rows and not heads.config.final_norm and not heads.config.normalise_embeddings
    ids, hidden = text(tiny_base)
    for ours, theirs in zip(our_logits(heads, hidden, ids), hydra_logits(tiny_base, tensors, config, hidden, ids), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        assert float(theirs.std()) > 0.5  # there is something to compare


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_medusa_computes_what_it_did(tiny_base: Base, tmp_path: Path, layers: int, own: bool) -> None:
    tensors, config = medusa_tensors(tiny_base, layers=layers, own=own), medusa_config(layers=layers)
    heads = imported(tiny_base, tmp_path, tensors, config, "medusa_lm_head.pt")
    assert (heads.config.kind, heads.config.own_rows, heads.config.num_blocks) == ("medusa", own, layers)
    ids, hidden = text(tiny_base)
    for ours, theirs in zip(our_logits(heads, hidden, ids), medusa_logits(tiny_base, tensors, config, hidden, ids), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["hydra", "hydra++"])
def test_a_round_trip_decodes_exactly(tiny_base: Base, tmp_path: Path, kind: str) -> None:
    """Heads that draft well, written by the published names and imported: the same tensors, the same drafts, the naive loop's
    tokens, with trees fixed and dynamic, greedy and sampled."""
    prompts = random_prompts(4, seed=1)
    heads = overfit_heads(tiny_base, kind, prompts, steps=60, num_blocks=2, own_rows=True, skip_bias=True, final_norm=False,
                          normalise_embeddings=False)
    back = imported(tiny_base, tmp_path, published(tiny_base, heads), hydra_config(prefix=kind == "hydra++"))
    wanted = heads.state_dict()
    assert back.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in back.state_dict().items())
    requests = [Request(f"r{i}", prompt, 24, temperature=(0.0, 0.9)[i // 4], seed=i) for i, prompt in enumerate(prompts * 2)]
    naive = [naive_generate(tiny_base, request).token_ids for request in requests]
    choices: list[tuple[Drafter, TreeSet | None]] = [(back, TREES), (AdaptiveDrafter(back, NgramDrafter(min_match=1)), None)]
    for drafter, trees in choices:
        results = Engine(tiny_base, drafter, *([trees] if trees else []), max_batch_size=3).generate(requests)
        assert [result.token_ids for result in results] == naive
        assert sum(result.accepted for result in results) > 0
    theirs = Engine(tiny_base, heads, TREES).generate(requests)
    ours = Engine(tiny_base, back, TREES).generate(requests)
    assert [result.accepted for result in ours] == [result.accepted for result in theirs]


def test_medusa_decodes_exactly(tiny_base: Base, tmp_path: Path) -> None:
    heads = imported(tiny_base, tmp_path, medusa_tensors(tiny_base), medusa_config(), "medusa_lm_head.pt")
    requests = [Request(f"r{i}", prompt, 24) for i, prompt in enumerate(random_prompts(4))]
    naive = [naive_generate(tiny_base, request).token_ids for request in requests]
    assert [result.token_ids for result in Engine(tiny_base, heads, TREES).generate(requests)] == naive


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_keep_their_dtype(tiny_base: Base, tmp_path: Path, dtype: torch.dtype) -> None:
    """In float16, as the Vicuna heads are published, with the copy of the base's embeddings rounded; a float32 table of the
    rotary frequencies, which older files hold, is no matter."""
    tensors = {name: value.to(dtype) for name, value in hydra_tensors(tiny_base, prefix=True).items()}
    table = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)
    tensors["prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"] = table
    heads = imported(tiny_base, tmp_path, tensors, hydra_config(prefix=True))
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert {value.dtype for name, value in written.items() if name != "draft_vocab.ids"} == {dtype}
    assert torch.equal(heads.state_dict()["own_rows.1.weight"], tensors["hydra_lm_head.1.1.weight"].float())


def test_frequencies_of_the_base_are_taken_where_the_file_has_them(tiny_base: Base, tmp_path: Path) -> None:
    """Hydra's code knows one theta; a file with the table of another one shows which it is."""
    own = tiny_base.vocabulary.config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    vocabulary = replace(tiny_base.vocabulary, config=SimpleNamespace(**own))
    tensors = hydra_tensors(tiny_base, prefix=True)
    tensors["prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"] = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    folder = write(tmp_path / "theirs", tensors, hydra_config(prefix=True))
    assert import_official(folder, tmp_path / "ours", vocabulary, {}).config.kind == "hydra++"


def test_the_folder_says_where_it_came_from(tiny_base: Base, tmp_path: Path) -> None:
    config = hydra_config()
    made = import_official(write(tmp_path / "theirs", hydra_tensors(tiny_base), config), tmp_path / "ours", tiny_base.vocabulary,
                           {"argv": ["x"]})
    origin = json.loads((tmp_path / "ours" / "provenance.json").read_text(encoding="utf-8"))
    assert origin["argv"] == ["x"] and origin["imported"]["config"] == config and len(origin["imported"]["sha256"]) == 64
    assert made.notes == () and made.config.own_rows
    assert made.parameters == sum(value.numel() for name, value in load_file(tmp_path / "ours" / "model.safetensors").items()
                                  if name != "draft_vocab.ids")


def test_what_is_unusual_is_said(tiny_base: Base, tmp_path: Path) -> None:
    """The published Vicuna folders of Medusa say 2 heads and hold 5; without a copy of the embeddings no file shows its base."""
    five = write(tmp_path / "five", medusa_tensors(tiny_base, heads=5), medusa_config(heads=2), "medusa_lm_head.pt")
    made = import_official(five, tmp_path / "a", tiny_base.vocabulary, {})
    assert made.config.num_heads == 5 and "says 2 heads and the file holds 5" in made.notes[1] and "a/base" in made.notes[0]
    tensors = hydra_tensors(tiny_base)
    del tensors["input_embed_fn.weight"]
    made = import_official(write(tmp_path / "b", tensors, hydra_config()), tmp_path / "c", tiny_base.vocabulary, {})
    assert "nothing in the file shows which base" in made.notes[0]


def test_no_code_runs(tiny_base: Base, tmp_path: Path) -> None:
    """A pickle may name any function to be called when it is read; here nothing is."""
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    folder = write(tmp_path / "theirs", hydra_tensors(tiny_base) | {"trap": Trap()}, hydra_config())  # type: ignore[dict-item]
    with pytest.raises(InputError, match="holds more than tensors: only those are loaded, since anything else is code"):
        import_official(folder, tmp_path / "ours", tiny_base.vocabulary, {})
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    torch.load(folder / "hydra_lm_head.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # as it would have been


def test_the_older_format_of_pt_files_is_read(tiny_base: Base, tmp_path: Path) -> None:
    """It cannot be mapped."""
    folder, tensors = write(tmp_path / "theirs", {}, medusa_config(), "medusa_lm_head.pt"), medusa_tensors(tiny_base)
    torch.save(tensors, folder / "medusa_lm_head.pt", _use_new_zipfile_serialization=False)
    import_official(folder, tmp_path / "ours", tiny_base.vocabulary, {})
    heads = load_checkpoint(tmp_path / "ours", tiny_base.vocabulary).drafter
    assert torch.equal(heads.state_dict()["own_rows.0.weight"], tensors["0.1.weight"])


def test_places(tiny_base: Base, tmp_path: Path) -> None:
    """A file by any name, with config.json beside it; a place that is taken or is none is refused."""
    folder = write(tmp_path / "theirs", medusa_tensors(tiny_base), medusa_config(), "mine.pt")
    assert import_official(folder / "mine.pt", tmp_path / "ours", tiny_base.vocabulary, {}).config.kind == "medusa"
    for source, output, told in ((folder / "mine.pt", tmp_path / "ours", "ours: already exists: name a new folder"),
                                 (tmp_path / "nowhere", tmp_path / "x", "nowhere: no such folder or file"),
                                 (folder / "config.json", tmp_path / "x", "config.json: is not a file of tensors"),
                                 (tmp_path / "ours", tmp_path / "x", "ours: holds no published heads")):
        with pytest.raises(InputError, match=told):
            import_official(source, output, tiny_base.vocabulary, {})


def test_a_smaller_draft_vocabulary_reads_the_same_rows(tiny_base: Base, tmp_path: Path) -> None:
    """Rows of their own follow the draft vocabulary, as the base's do."""
    heads = imported(tiny_base, tmp_path, hydra_tensors(tiny_base), hydra_config())
    few = heads.with_draft_vocab(DraftVocab(torch.tensor([9, 5, 200]), tiny_base.vocabulary.size))
    ids, hidden = text(tiny_base)
    for packed in (False, True):
        if packed:
            few.pack()
        for whole, some in zip(our_logits(heads, hidden, ids), our_logits(few, hidden, ids), strict=True):
            torch.testing.assert_close(some, whole[:, [9, 5, 200]])
