"""Heads of a run as a folder that goes with the package: whole, loadable, without the places of the machine that made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.bundled import folders as bundled
from hydra_core.decoding import Engine, load_heads, naive_generate
from hydra_core.errors import InputError
from hydra_core.proposers import AdaptiveDrafter
from hydra_core.sampling import Request
from pipelines.config import RunConfig, load_config
from pipelines.promote import package_heads as module
from pipelines.promote.package_heads import package, trainings_of, without_places
from pipelines.runtime.artifacts import RunPaths
from pipelines.train.stage import run_train
from pipelines.tree.stage import run_tree
from tests.pipelines.synthetic import write_distilled


def with_start(config: RunConfig, name: str, start: str) -> RunConfig:
    (heads,) = config.train.drafters.values()
    train = config.train.model_copy(update={"drafters": {name: heads}, "start": {name: start}})
    return config.model_copy(update={"train": train})


def test_places_are_left_out() -> None:
    words = ["/usr/bin/tool", "--config", "/a/b.yaml", "p.q=/c/d.l", "p={q: /c/d/e, r: 1}", "p.q=/c d/e.l", "n=1"]
    found = without_places({"storage": "/x", "argv": words, "n": {"path": "/c/d.l", "k": 1}})
    assert found == {"argv": ["tool", "--config", "b.yaml", "p.q=d.l", "p={q: e, r: 1}", "p.q=e.l", "n=1"],
                     "n": {"path": "d.l", "k": 1}}


@pytest.mark.slow
def test_heads_of_a_run_are_packaged(tiny_base: Base, tiny_base_dir: Path, storage: Path, tmp_path: Path, local_ray: None,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config(None, {
        "storage": str(storage), "base.model": str(tiny_base_dir), "base.dtype": "fp32", "train.max_steps": 8,
        "train.rows_per_step": 8, "train.validate_every": 4, "train.validation_rows": 8, "train.precision": "bf16",
        "train.drafters": {"hydra++": {"kind": "hydra++", "draft_vocab_size": 100, "num_heads": 2}},
        "tree.batch_sizes": [1], "tree.node_counts": [1, 2, 4], "tree.far_contexts": [], "tree.context": 16})
    with pytest.raises(InputError, match="heads"):
        package(config, "hydra++", tmp_path / "bundled" / "tiny")
    write_distilled(config, tiny_base, train=64, held_out=16)
    run_train(config)
    run_tree(config)
    folder = tmp_path / "bundled" / "tiny"
    folder.parent.mkdir()
    for _ in range(2):  # a second time replaces the first
        package(config, "hydra++", folder)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    curve = json.loads((folder / "curve.json").read_text())
    assert [(point["training"], point["step"]) for point in curve] == [(1, 4), (1, 8)]
    assert set(curve[0]) == {"training", "step", "loss", "tokens_per_step", "head0_top1", "head1_top1"}
    for file in (folder / "recipe.yaml", folder / "heads" / "provenance.json"):
        assert str(tmp_path) not in file.read_text()
    recipe = load_config(str(folder / "recipe.yaml"))
    assert recipe.train == config.train and recipe.base.dtype == "fp32"

    monkeypatch.setattr(bundled, "FOLDER", folder.parent)
    drafter, _ = load_heads("bundled", tiny_base)
    assert isinstance(drafter, AdaptiveDrafter)
    request = Request("a", (5, 6, 7), 20)
    assert Engine(tiny_base, drafter).generate([request])[0].token_ids == naive_generate(tiny_base, request).token_ids

    more = with_start(config, "more", str(RunPaths.of(config).stage("train", "hydra++") / "heads"))
    run_train(more)
    made = RunPaths.of(more).stage("train", "more")
    first, second = trainings_of(more, "more", made)
    assert first[0] == (folder / "recipe.yaml").read_text() and second[1] != first[1]
    assert [{"training": 1} | point for point in first[1]] == curve and [point["step"] for point in second[1]] == [4, 8]
    run_tree(more)
    package(more, "more", folder)
    assert (folder / "recipe-1.yaml").read_text() == first[0] and (folder / "recipe.yaml").read_text() == second[0]
    assert [point["training"] for point in json.loads((folder / "curve.json").read_text())] == [1, 1, 2, 2]
    third = trainings_of(with_start(more, "more", "bundled"), "more", made)
    assert third[:2] == [first, second] and third[2] == second
    with pytest.raises(InputError, match="lies in no folder of a training"):
        trainings_of(with_start(more, "more", str(folder / "heads")), "more", made)
    shutil.copytree(made, tmp_path / "renamed")
    with pytest.raises(InputError, match=r"renamed: its config\.yaml trains more: give the folder"):
        trainings_of(with_start(more, "again", str(tmp_path / "renamed" / "heads")), "again", made)

    monkeypatch.setattr(module, "LARGEST", 1000.0)
    with pytest.raises(InputError, match="MB, more than"):
        package(config, "hydra++", folder)
