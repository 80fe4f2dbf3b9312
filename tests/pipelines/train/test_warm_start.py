"""Training that goes on from earlier heads: their weights, a fingerprint of its own, and mistakes told before it starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_core.base import Base
from hydra_core.errors import InputError
from hydra_core.heads import build_drafter
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import default_trees
from pipelines.config import RunConfig, load_config
from pipelines.runtime.artifacts import RunPaths
from pipelines.train.stage import _fingerprint, _settings, run_train
from pipelines.train.warm_start import check_start, load_start
from tests.pipelines.synthetic import write_distilled
from tests.trained import draft_vocab_of, overfit_heads, random_heads, random_prompts


def config_for(base_dir: Path, storage: Path, start: Path | str | None, **heads: Any) -> RunConfig:
    architecture = {"kind": "hydra++", "draft_vocab_size": 200, "num_heads": 3} | heads
    return load_config(None, {
        "storage": str(storage), "name": "on", "base.model": str(base_dir), "base.dtype": "fp32",
        "train.drafters": {"hydra++": architecture}, "train.rows_per_step": 8, "train.max_steps": 10, "train.epochs": 50,
        "train.validate_every": 5, "train.lr": 1e-4, "train.validation_rows": 16,
        "train.start": {"hydra++": str(start)} if start else {}})


@pytest.fixture(scope="module")
def earlier(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier") / "heads"
    save_checkpoint(folder, overfit_heads(tiny_base, "hydra++", random_prompts(4, seed=1)), tiny_base.identity,
                    default_trees(3), {})
    return folder


def test_weights_are_taken_over_and_the_vocabulary_is_not(tiny_base: Base, tiny_base_dir: Path, storage: Path,
                                                          earlier: Path) -> None:
    config = config_for(tiny_base_dir, storage, earlier, loss="acceptance", dropout=0.5)
    drafter = build_drafter(config.train.drafters["hydra++"], tiny_base.vocabulary, draft_vocab_of(tiny_base, 200))
    load_start(drafter, config, "hydra++", tiny_base.vocabulary)
    known = overfit_heads(tiny_base, "hydra++", random_prompts(4, seed=1)).state_dict()
    assert known.keys() == drafter.state_dict().keys()
    assert all(torch.equal(known[name], tensor) for name, tensor in drafter.state_dict().items())
    assert len(drafter.draft_vocab) == 200 and all(tensor.requires_grad for tensor in drafter.parameters())


def test_other_weights_are_other_work(tiny_base: Base, tiny_base_dir: Path, storage: Path, earlier: Path,
                                      tmp_path: Path) -> None:
    plain = _fingerprint(config_for(tiny_base_dir, storage, None), "hydra++", "d")
    first = _fingerprint(config_for(tiny_base_dir, storage, earlier), "hydra++", "d")
    moved = shutil.copytree(earlier, tmp_path / "moved")
    assert first == _fingerprint(config_for(tiny_base_dir, storage, moved), "hydra++", "d") != plain
    save_checkpoint(moved, random_heads(tiny_base, "hydra++", seed=3), tiny_base.identity, default_trees(3), {})
    assert _fingerprint(config_for(tiny_base_dir, storage, moved), "hydra++", "d") not in (first, plain)


def test_trainings_older_than_a_field_are_what_they_were(tiny_base_dir: Path, storage: Path) -> None:
    known = _settings(config_for(tiny_base_dir, storage, None), "hydra++")
    assert not {"recurrent", "skip_bias", "own_rows"} & known["heads"].keys() and "start" not in known["train"]
    assert _settings(config_for(tiny_base_dir, storage, None, recurrent=True), "hydra++")["heads"]["recurrent"] is True


def test_mistakes(tiny_base: Base, tiny_base_dir: Path, storage: Path, earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.start\.hydra\+\+=.*: num_blocks is 2 there and 4 in train\.drafters"):
        check_start(config_for(tiny_base_dir, storage, earlier, num_blocks=4), "hydra++", tiny_base.vocabulary)
    with pytest.raises(InputError, match=r"config\.json is missing: name the folder of a heads checkpoint"):
        _fingerprint(config_for(tiny_base_dir, storage, tmp_path / "nowhere"), "hydra++", "d")
    with pytest.raises(InputError, match=r"train\.start\.hydra\+\+=bundled: no heads for base .* come with the package"):
        _fingerprint(config_for(tiny_base_dir, storage, "shipped"), "hydra++", "d")
    with pytest.raises(InputError, match=r"train: train\.start: 'medusa' is none of train\.drafters"):
        load_config(None, {"train.drafters": {"hydra": {"kind": "hydra"}}, "train.start": {"medusa": "shipped"}})


@pytest.mark.slow
def test_it_goes_on_where_they_were(tiny_base: Base, tiny_base_dir: Path, storage: Path, local_ray: None) -> None:
    def trained(name: str, rate: float, start: str | None) -> dict[str, Any]:
        config = load_config(None, {
            "storage": str(storage), "name": name, "base.model": str(tiny_base_dir), "base.dtype": "fp32",
            "train.drafters": {"hydra": {"kind": "hydra", "draft_vocab_size": 200, "num_heads": 2}}, "train.rows_per_step": 8,
            "train.max_steps": 20, "train.epochs": 50, "train.validate_every": 20, "train.lr": rate, "train.validation_rows": 16,
            "train.workers.count": 1, "train.start": {"hydra": start} if start else {}})
        write_distilled(config, tiny_base)
        found = run_train(config)
        losses = [json.loads(line)["loss"] for line in
                  (RunPaths.of(config).stage("train", "hydra") / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
        return {"top1": found.figures["hydra"]["top1"], "loss": losses, "heads": found.outputs["hydra"]}

    first = trained("first", 3e-3, None)
    on = trained("on", 1e-12, first["heads"])  # hardly a step further
    assert on["top1"] == first["top1"]
    assert sum(on["loss"]) < sum(first["loss"]) and first["loss"][-1] < first["loss"][0]
