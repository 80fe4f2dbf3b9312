"""Variants side by side: real trainings of a tiny base, their figures, and what stands is not trained again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.errors import InputError
from pipelines.ablate.stage import run_ablate
from pipelines.ablate.variants import summarise, training_name, variant_config
from pipelines.config import RunConfig, load_config
from pipelines.rows.feature_store import FeatureStore
from pipelines.runtime.artifacts import RunPaths
from pipelines.tracking import Tracker
from tests.pipelines.synthetic import write_distilled


def config_for(storage: Path, base: Path, **ablate: object) -> RunConfig:
    return load_config(None, {"storage": str(storage), "name": "a", "base.model": str(base), "base.dtype": "fp32",
                              "train.rows_per_step": 8, "train.epochs": 1, "train.validate_every": 4, "train.lr": 3e-3,
                              "train.validation_rows": 16, "ablate": ablate})


def test_figures_by_hand() -> None:
    figures = [{"tokens_per_step": value, "top1": [value / 4, 0.5], "response_tokens": 10, "steps": 2, "seconds": value}
               for value in (1.0, 2.0, 3.0)]
    found = summarise(figures)
    assert found.tokens_per_step == 2.0 and found.top1 == (0.5, 0.5) and found.seconds == 2.0
    assert found.spread == pytest.approx(4.303 / 3 ** 0.5, rel=1e-3)  # a standard deviation of 1 over three seeds
    assert summarise(figures[:1]).spread is None
    assert training_name("no prefix layer", 2) == "no-prefix-layer.seed2"


def test_what_cannot_be_compared(storage: Path, tiny_base_dir: Path) -> None:
    heads = {"heads": {"kind": "medusa"}}
    for ablate, told in (({"variants": {"a": heads}, "studies": {"q": ["a"]}}, "two variants"),
                         ({"variants": {"a": heads}, "studies": {"q": ["a", "b"]}}, "'b' is none of ablate.variants"),
                         ({"variants": {"a b": heads, "a-b": heads}}, "give the same folder name"),
                         ({"variants": {"": heads}}, "begin with a letter"),
                         ({"variants": {"a": {"heads": {"kind": "medusa"}, "share": 0}}}, "share")):
        with pytest.raises(InputError, match="ablate") as caught:
            config_for(storage, tiny_base_dir, **ablate)
        assert told in str(caught.value), caught.value
    with pytest.raises(InputError, match=r"ablate\.variants: is empty"):
        run_ablate(config_for(storage, tiny_base_dir))


def test_a_share_of_the_rows_lies_inside_a_larger_one(tiny_base: Base, storage: Path, tiny_base_dir: Path) -> None:
    features = write_distilled(config_for(storage, tiny_base_dir), tiny_base, train=96, held_out=8)
    whole, half, quarter = (set(FeatureStore.open(features, "train", share=share).index.ids) for share in (1.0, 0.5, 0.25))
    assert len(whole) == 96 and quarter < half < whole and 30 < len(half) < 66 and 8 < len(quarter) < 42


def test_a_variant_is_a_run_that_workers_can_read(tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir, variants={"a": {"heads": {"kind": "medusa"}, "epochs": 3, "share": 0.5}})
    config = config.model_copy(update={"train": config.train.model_copy(update={"start": {"hydra++": "shipped"}})})
    made = variant_config(config, "a.seed7", config.ablate.variants["a"], 7)
    assert RunConfig.model_validate(made.model_dump(mode="json", by_alias=True)) == made
    assert (made.train.seed, made.train.epochs, made.train.share, made.train.start) == (7, 3, 0.5, {})
    assert list(made.train.drafters) == ["a.seed7"]


@pytest.mark.slow
@pytest.mark.drawn
def test_variants_are_trained_once_and_reported(tiny_base: Base, tiny_base_dir: Path, storage: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    small = {"num_heads": 2, "draft_vocab_size": 100}
    asked = {"variants": {"medusa": {"heads": {"kind": "medusa", **small}, "seeds": [0, 1]},
                          "half the rows": {"heads": {"kind": "medusa", **small}, "share": 0.5}},
             "studies": {"Rows: all, half": ["medusa", "half the rows"]}}
    config = config_for(storage, tiny_base_dir, **asked)
    write_distilled(config, tiny_base, train=64, held_out=16)
    result = run_ablate(config)
    variants = result.figures["variants"]
    assert variants["medusa"]["seeds"] == 2 and variants["medusa"]["spread"] is not None
    assert variants["half the rows"]["response_tokens"] < 0.8 * variants["medusa"]["response_tokens"]
    folder = RunPaths.of(config).stage("ablate")
    text = (folder / "report.md").read_text()
    assert "## Rows: all, half" in text and "| half the rows |" in text
    assert (folder / "ablations.png").read_bytes().startswith(b"\x89PNG")
    curves = [RunPaths.of(config).stage("train", name) / "curve.jsonl"
              for name in ("medusa.seed0", "medusa.seed1", "half-the-rows.seed0")]
    trained = [curve.stat().st_mtime for curve in curves]
    losses = [[json.loads(line)["loss"] for line in curve.read_text().splitlines()] for curve in curves]
    assert losses[0] != losses[1] and len(losses[2]) < len(losses[0])
    metrics = MlflowClient(Tracker.open(config).uri).get_run(str(result.run_id)).data.metrics
    assert metrics["medusa.tokens_per_step"] == pytest.approx(variants["medusa"]["tokens_per_step"])

    asked["studies"] = {"All rows first": ["medusa", "half the rows"]}
    again = run_ablate(config_for(storage, tiny_base_dir, **asked))
    assert again.figures["variants"] == variants and "## All rows first" in (folder / "report.md").read_text()
    assert trained == [curve.stat().st_mtime for curve in curves]
