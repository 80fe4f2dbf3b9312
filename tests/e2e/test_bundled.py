"""The bundled heads: complete, small, made for the embedded base, and worth using."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hydra_core import Engine, Request, load_base, load_heads, naive_generate
from hydra_core.base import EMBEDDED_BASE
from hydra_core.bundled import FOLDER, bundled_configuration
from hydra_core.decoding import read_configuration
from hydra_core.decoding.configuration import ANY_FORMAT
from hydra_core.proposers import AdaptiveDrafter
from hydra_core.proposers.calibration import CostCalibrator
from hydra_core.tree.costs import StepCosts
from jobs.runner import run
from pipelines.config import load_config
from pipelines.generate import stage as generate_stage
from pipelines.quickstart import first_answers
from tests.e2e.test_smollm2 import QUESTIONS

FOLDERS = sorted(path.parent for path in FOLDER.glob("*/configuration.json"))


@pytest.fixture
def steady_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps cost what they cost on an idle machine: on a loaded one the dynamic tree may rightly draft next to nothing."""
    costs = StepCosts({1: {1: 1.0, 16: 1.3}}, {1: {0: 0.0, 4: 0.15}})
    for module in (first_answers, generate_stage):
        monkeypatch.setattr(module, "costs_of_one", lambda *_: costs)
    for name in ("update", "update_drafting"):
        monkeypatch.setattr(CostCalibrator, name, lambda *_: None)


def test_heads_are_bundled() -> None:
    assert [folder.name for folder in FOLDERS] == ["smollm2_135m"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_bundled_heads_record_how_they_were_made(folder: Path) -> None:
    configuration = read_configuration(folder)
    assert configuration.drafter == "combined" and configuration.base.weight_format == ANY_FORMAT
    tensors = load_file(folder / "heads" / "model.safetensors")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40e6
    assert {tensor.dtype for name, tensor in tensors.items() if name != "draft_vocab.ids"} == {torch.bfloat16}
    provenance = json.loads((folder / "heads" / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["training"]["tokens_per_step"] > 1.5 and provenance["versions"]["torch"] and provenance["git"]["commit"]
    curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    assert len(curve) > 3 and curve[-1]["tokens_per_step"] > curve[0]["tokens_per_step"]
    assert load_config(str(folder / "recipe.yaml")).train.drafters
    for file in (*folder.glob("recipe*.yaml"), folder / "heads" / "provenance.json"):
        assert not any(sign in file.read_text(encoding="utf-8") for sign in ('"/', ": /", "=/"))


@pytest.mark.slow
@pytest.mark.usefixtures("steady_costs")
def test_bundled_heads_draft_for_the_embedded_base_and_change_no_token(tmp_path: Path) -> None:
    base = load_base(EMBEDDED_BASE, dtype="fp32", cache=tmp_path)
    assert bundled_configuration(base.identity.digest) == FOLDER / "smollm2_135m"
    drafter, _ = load_heads("bundled", base)
    assert isinstance(drafter, AdaptiveDrafter) and drafter.heads is not None
    requests = [Request(str(i), tuple(base.encode_prompt(text)), 48) for i, text in enumerate(QUESTIONS)]
    results = Engine(base, drafter, max_batch_size=1).generate(requests)
    for request, result in zip(requests, results, strict=True):
        assert result.token_ids == naive_generate(base, request).token_ids
    assert sum(len(result.token_ids) - 1 for result in results) > 1.4 * sum(result.steps for result in results)


@pytest.mark.slow
@pytest.mark.usefixtures("steady_costs")
def test_a_first_answer_without_training_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HYDRA_HEADS_STORAGE", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run("generate", ["Count from one to twenty in words.", "max_new_tokens=60"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert "smollm2_135m" in found["model"] and found["answers"][0]["tokens_per_step"] > 1.2


@pytest.mark.slow
@pytest.mark.usefixtures("steady_costs")
def test_a_quickstart_shows_what_they_bring_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(first_answers, "NEW_TOKENS", 32)
    threads = torch.get_num_threads()
    config = load_config(None, {"storage": str(tmp_path), "base.dtype": "fp32", "bench.threads": threads + 1})
    answers = first_answers.show_first_answers(config)
    assert [one.question for one in answers] == list(first_answers.QUESTIONS) and torch.get_num_threads() == threads
    assert all(one.plain.token_ids == one.drafted.token_ids for one in answers)
    assert sum(len(one.drafted.token_ids) - 1 for one in answers) > 1.3 * sum(one.drafted.steps for one in answers)
    told = capsys.readouterr().err
    assert all(f'"{question}"' in told for question in first_answers.QUESTIONS)
    assert "plain tokens/s" in told and "bundled tokens/s" in told and "differ" not in told
