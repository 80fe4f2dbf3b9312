"""The folder that vLLM reads, and the chain that it runs, without vLLM: what is written, what is refused, what is drafted."""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hydra_core.base import Base
from hydra_core.decoding.configuration import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError
from hydra_core.heads import HeadDrafter
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.interop import KEY, ExportedHeads, VllmExport, export_to_vllm, serve_command, vllm_compat, vllm_plugin
from hydra_core.interop.vllm_export import exported_tensors
from hydra_core.interop.vllm_format import BIAS, IDS, ROWS
from hydra_core.interop.vllm_model import DraftChain
from hydra_core.proposers.heads import HeadProposer
from hydra_core.sampling import Request
from hydra_core.sampling.sampler import Sampler
from hydra_core.tree import DraftTree, TreeSet
from tests.conftest import ROOT
from tests.trained import random_heads

TREES = TreeSet({1: DraftTree(((0,), (0, 0), (0, 0, 0)))})
KINDS: dict[str, dict[str, object]] = {
    "medusa": {"kind": "medusa"}, "hydra": {"kind": "hydra", "num_blocks": 2}, "recurrent": {"kind": "hydra", "recurrent": True},
    "gated": {"kind": "hydra", "mlp": "gated"},
    "as published": {"kind": "hydra", "normalise_embeddings": False, "final_norm": False}}


def heads_of(base: Base, name: str) -> HeadDrafter:
    """Heads whose every tensor counts: trained blocks do not start at zero."""
    fields = dict(KINDS.get(name, {"kind": name}))
    heads = random_heads(base, str(fields.pop("kind")), draft_vocab_size=60, **fields)
    for parameter in heads.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return heads


def exported(base: Base, name: str, folder: Path, output: str = "out") -> VllmExport:
    save_checkpoint(folder / "heads", heads_of(base, name), base.identity, TREES, {})
    return export_to_vllm(folder / "heads", base.vocabulary, folder / output)


def loaded(base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: int) -> DraftChain:
    """The export as vLLM loads it, with a stand-in for vLLM."""
    settings = {"count": 3, "width": base.vocabulary.width, "vocab": base.vocab_size, "stages": 1, "ranks": 1} | changes
    read = SimpleNamespace(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=settings["count"],
                                           draft_model_config=SimpleNamespace(hf_config=read)),
        model_config=SimpleNamespace(get_hidden_size=lambda: settings["width"], get_vocab_size=lambda: settings["vocab"]),
        parallel_config=SimpleNamespace(pipeline_parallel_size=settings["stages"], tensor_parallel_size=settings["ranks"]))
    monkeypatch.setattr(vllm_compat, "install", lambda: None)
    table = nn.Embedding.from_pretrained(base.vocabulary.embedding)
    monkeypatch.setattr(vllm_compat, "embedding_of", lambda target, width: table)
    chain = DraftChain(vllm_config=config)
    chain.load_weights(load_file(folder / "model.safetensors").items())
    return chain.eval()


@pytest.mark.parametrize("name", KINDS)
def test_the_chain_drafts_what_our_own_engine_drafts(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     name: str) -> None:
    export = exported(tiny_base, name, tmp_path)
    assert (export.num_heads, export.dtype) == (3, torch.float32)
    proposer = HeadProposer(heads_of(tiny_base, name), TREES, 4, 32)
    hidden, roots = torch.randn(4, tiny_base.vocabulary.width), torch.tensor([5, 90, 7, 5])
    proposer.commit((0, 4), hidden[:, None], torch.ones(4, dtype=torch.int64))
    with torch.inference_mode():
        ours = proposer.propose(roots, [3] * 4, [Sampler(Request("x", (1,), 1), 288)] * 4).tokens[:, 1:]
    chain = loaded(tiny_base, export.folder, monkeypatch)
    for count in (3, 2, 0):
        chain.begin(roots, nn.Module())
        drafted = chain.draft(hidden, count)
        assert drafted.dtype == torch.int64 and torch.equal(drafted, ours[:, :count])
    assert len(set(map(tuple, ours.tolist()))) > 1 and chain(hidden).shape == hidden.shape


@pytest.mark.parametrize("name", KINDS)
def test_tensors_and_config_come_back(tiny_base: Base, tmp_path: Path, name: str) -> None:
    heads = heads_of(tiny_base, name)
    folder = exported(tiny_base, name, tmp_path).folder
    exported(tiny_base, name, tmp_path)  # a second export replaces the first
    found, head = load_file(folder / "model.safetensors"), tiny_base.vocabulary.head
    assert found.keys() == {*heads.state_dict(), IDS, ROWS}
    assert all(torch.equal(found[key], tensor) for key, tensor in heads.state_dict().items())
    assert torch.equal(found[IDS], heads.draft_vocab.ids) and torch.equal(found[ROWS], head.weight[heads.draft_vocab.ids])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    about = ExportedHeads.from_config(config[KEY])
    assert about.heads == heads.config and about.base["digest"] == tiny_base.identity.digest
    assert config["model_type"] == "medusa" and config["num_heads"] == 3 and config["dtype"] == "float32"
    assert not [key for key in config if "num" in key and key not in ("num_heads", "num_hidden_layers")]  # vLLM renames these
    assert {path.name for path in tmp_path.iterdir()} == {"heads", "out"}  # nothing half-written is left


def test_a_bias_and_bfloat16(tiny_base: Base) -> None:
    heads = heads_of(tiny_base, "hydra")
    heads.rows = replace(heads.rows, weight=heads.rows.weight.bfloat16(), bias=torch.randn(60).bfloat16())
    found = exported_tensors(heads)
    assert torch.equal(found[BIAS], heads.rows.bias) and found[IDS].dtype == torch.int64
    assert {tensor.dtype for key, tensor in found.items() if key != IDS} == {torch.bfloat16}


def test_what_vllm_cannot_run_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    def refused(words: str, heads: Path | str = tmp_path / "heads", output: Path | str = tmp_path / "out") -> None:
        with pytest.raises(InputError, match=words) as error:
            export_to_vllm(heads, tiny_base.vocabulary, output)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    save_checkpoint(tmp_path / "heads", heads_of(tiny_base, "hydra++"), tiny_base.identity, TREES, {})
    refused(r"heads: kind=hydra\+\+: its prefix layer")
    save_checkpoint(tmp_path / "heads", random_heads(tiny_base, "medusa", own_rows=True), tiny_base.identity, TREES, {})
    refused("vocabulary rows of their own")
    save_checkpoint(tmp_path / "heads", heads_of(tiny_base, "hydra"), replace(tiny_base.identity, digest="0" * 64), TREES, {})
    refused("belong to base")
    save_checkpoint(tmp_path / "heads", heads_of(tiny_base, "hydra"), tiny_base.identity, TREES, {})
    refused("exists and is no earlier export", output=tmp_path / "heads")
    refused("exists and is no earlier export", output=tmp_path)
    refused("'eagle3' in its path", output=tmp_path / "Eagle3-like")
    refused("a folder of its machine", output="s3://bucket/out")
    refused("cannot be read", heads=tmp_path / "nowhere")
    refused("no heads are bundled", heads="bundled")
    save_configuration(tmp_path / "ngram", DecodingConfiguration("x", "ngram", tiny_base.identity))
    refused("has no heads", heads=tmp_path / "ngram")
    save_configuration(tmp_path / "with", DecodingConfiguration("x", "combined", tiny_base.identity, heads=tmp_path / "heads"))
    assert export_to_vllm(tmp_path / "with", tiny_base.vocabulary, tmp_path / "out").kind == "hydra"


def test_what_does_not_fit_is_refused_when_it_loads(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    folder = exported(tiny_base, "hydra", tmp_path).folder
    for changes, words in (({"count": 4}, "num_speculative_tokens=4: there are 3 heads"), ({"width": 64}, "serve their base"),
                           ({"vocab": 300}, "serve their base"), ({"stages": 2}, "pipeline_parallel_size=2")):
        with pytest.raises(InputError, match=words):
            loaded(tiny_base, folder, monkeypatch, **changes)
    loaded(tiny_base, folder, monkeypatch, ranks=2)
    assert "2 ranks drafts by itself" in caplog.text
    tensors = load_file(folder / "model.safetensors")
    damages: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "rows is missing": lambda found: found.pop(ROWS), "unexpected tensor": lambda found: found.update(more=torch.ones(1)),
        "has shape": lambda found: found.update({ROWS: found[ROWS][1:].contiguous()})}
    for words, damage in damages.items():
        damage(broken := dict(tensors))
        save_file(broken, folder / "model.safetensors")
        with pytest.raises(InputError, match=words):
            loaded(tiny_base, folder, monkeypatch)


@pytest.mark.parametrize(("change", "words"), [({"schema_version": 2}, "schema_version 2 is not 1"), ({"width": None}, "width"),
                                               ({"heads": {"kind": "eagle9"}}, "export the heads again")])
def test_another_schema_is_refused(tiny_base: Base, tmp_path: Path, change: dict[str, object], words: str) -> None:
    folder = exported(tiny_base, "hydra", tmp_path).folder
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))[KEY] | change
    with pytest.raises(InputError, match=words):
        ExportedHeads.from_config({key: value for key, value in values.items() if value is not None})


def test_the_command_that_serves(tiny_base: Base, tmp_path: Path) -> None:
    export = exported(tiny_base, "hydra", tmp_path, "it's")
    command = serve_command(export, "org/model@v1")
    assert command.startswith("vllm serve org/model --revision v1 --dtype float32 --speculative-config '{\"method\": \"medusa\"")
    assert '"num_speculative_tokens": 3' in command


def test_the_versions_that_were_not_tried_are_told(caplog: pytest.LogCaptureFixture) -> None:
    assert vllm_compat.warn_of_other_versions("0.32.5", (0, 32, 5)) and not caplog.records
    assert not vllm_compat.warn_of_other_versions("0.33.0", (0, 33, 0))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "vLLM 0.33.0 is outside the tested range (>=0.32,<0.33)" in record.getMessage()


def test_vllm_finds_the_plugin() -> None:
    """By the name in pyproject.toml, which an installation hands to vLLM."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["hydra_heads"].split(":")
    assert (module, getattr(vllm_plugin, name)) == (vllm_plugin.__name__, vllm_plugin.register)


def test_the_entry_point_never_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An installation in which vLLM has another inside works as before, without these heads."""
    def broken(architecture: str, where: str) -> None:
        raise AttributeError("moved")

    monkeypatch.setattr(vllm_compat, "register_model", broken)
    vllm_plugin.register()
    assert "cannot be loaded by this vLLM (AttributeError: moved)" in caplog.text
