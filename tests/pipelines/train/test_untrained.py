"""Untrained heads that serving can be tried with, and a run folder that a later training finds as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine, load_heads, naive_generate
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.sampling import Request
from jobs import runner
from pipelines.config import load_config
from pipelines.runtime.artifacts import RunPaths, finished
from pipelines.train.stage import _fingerprint, run_train
from tests.pipelines.synthetic import write_distilled


@pytest.mark.parametrize("after_distill", [False, True])
def test_a_dry_run_saves_heads_that_decode_and_leaves_training_alone(tiny_base: Base, tiny_base_dir: Path, storage: Path,
                                                                     after_distill: bool) -> None:
    settings = {"storage": str(storage), "name": "dry", "base.model": str(tiny_base_dir), "base.dtype": "fp32",
                "train.drafters": {"hydra++": {"kind": "hydra++", "draft_vocab_size": 100},
                                   "medusa": {"kind": "medusa", "draft_vocab_size": 0, "num_heads": 2}}}
    config = load_config(None, settings | {"train.dry_run": True})
    if after_distill:
        write_distilled(config, tiny_base, train=8, held_out=4)
    for _ in range(2):  # as often as one likes
        result = run_train(config)
    assert result.figures == {"dry_run": True} and set(result.outputs) == {"hydra++", "medusa"}
    vocab = load_checkpoint(Path(result.outputs["hydra++"]), tiny_base.vocabulary).drafter.draft_vocab
    assert len(vocab) == 100 and set(tiny_base.stop_ids) <= set(vocab.ids.tolist())
    request = Request("a", (5, 6, 7), 20)
    for folder in result.outputs.values():
        drafter, trees = load_heads(folder, tiny_base)
        (answer,) = Engine(tiny_base, drafter, trees).stream([request])
        assert answer.token_ids == naive_generate(tiny_base, request).token_ids
    assert not RunPaths.of(config).stage("train").exists()
    real = load_config(None, settings)
    assert finished(RunPaths.of(real).stage("train", "medusa"), _fingerprint(real, "medusa", "d")) is None
    assert _fingerprint(real, "medusa", "d") == _fingerprint(config, "medusa", "d")


def test_a_flag_asks_for_it(tiny_base_dir: Path, storage: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32"]
    assert runner.run("train", ["--dry-run", *words, "train.only=medusa"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["dry_run"] and said["outputs"] == {"medusa": f"{storage}/runs/default/train-dry/medusa/heads"}
    assert runner.run("bench", ["--dry-run"]) == 2
