"""A learning curve of a tiny base for real: killed in the middle, continued, in MLflow, and not made twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.errors import InputError
from jobs.runner import read_config
from pipelines.ablate.variants import training_ids
from pipelines.curve.stage import run_curve
from pipelines.rows.feature_store import FeatureStore
from pipelines.runtime.artifacts import RunPaths
from pipelines.tracking import Tracker
from tests.pipelines.synthetic import write_distilled
from tests.processes import killed_when

SHARES = (0.125, 0.25, 0.375, 0.5, 1.0)


def words(storage: Path, base: Path, *more: str) -> list[str]:
    return [f"storage={storage}", "name=c", f"base.model={base}", "base.dtype=fp32", "train.rows_per_step=4", "train.epochs=1",
            "train.validate_every=50", "train.lr=3e-3", "train.validation_rows=16",
            "train.drafters={small: {kind: medusa, num_heads: 2, draft_vocab_size: 100}}", "curve.least_steps=4",
            "curve.seeds=[1]", f"curve.shares={list(SHARES)}", *more]


def test_what_is_wrong_is_told_before_a_training(tiny_base: Base, tiny_base_dir: Path, storage: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="no finished `distill` here"):
        run_curve(read_config("curve", None, words(storage, tiny_base_dir)))
    config = read_config("curve", None, words(storage, tiny_base_dir))
    features = write_distilled(config, tiny_base, train=24, held_out=8)
    assert set(training_ids(config)) == set(FeatureStore.open(features, "train").index.ids)
    for more, told in (("curve.drafters=[x]", r"curve\.drafters: 'x' is none of train\.drafters: small"),
                       ("curve.shares=[0.05,1]", r"the share 0\.05 of 24 training rows is \d row.*fewer than the 4 of one step")):
        with pytest.raises(InputError, match=told):
            run_curve(read_config("curve", None, words(storage, tiny_base_dir, more)))
    assert not RunPaths.of(config).stage("train").exists()


@pytest.mark.slow
@pytest.mark.drawn
def test_a_curve_that_is_killed_and_continued(tiny_base: Base, tiny_base_dir: Path, storage: Path, worker_env: dict[str, str],
                                              local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = words(storage, tiny_base_dir)
    config = read_config("curve", None, given)
    features = write_distilled(config, tiny_base, train=64, held_out=16)
    trainings = RunPaths.of(config).stage("train")
    second = trainings / "small.share0.25.seed1"
    killed_when(lambda: (second / "claim.json").exists(), [sys.executable, "-m", "jobs.curve", *given], worker_env)
    before = {path: path.stat().st_mtime_ns for path in trainings.rglob("manifest.json")}
    assert {path.parent.name for path in before} == {"small.share0.125.seed1"}

    result = run_curve(config)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), "what was trained is not trained again"
    figures = result.figures["small"]
    assert [point["share"] for point in figures["points"]] == list(SHARES)
    assert [point["rows"] for point in figures["points"]] == [
        len(FeatureStore.open(features, "train", share=share).index.ids) for share in SHARES]
    assert all(1 <= value <= 3 for point in figures["points"] for value in point["values"])
    steps = [point["steps"] for point in figures["points"]]
    assert steps[0] == 4 and steps[-1] == 16
    for share, expected in zip(SHARES, steps, strict=True):
        curve = trainings / f"small.share{share:g}.seed1" / "curve.jsonl"
        assert [json.loads(line)["step"] for line in curve.read_text().splitlines()] == list(range(expected))
    folder = RunPaths.of(config).stage("curve")
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "report.json").read_text())
    assert report["drafters"]["small"]["backtest"]["foretold"]["rows"] == 64
    assert report["cost"]["distill"] is None and report["cost"]["train"] > 0  # those rows were not distilled
    assert all(line in (folder / "report.md").read_text() for line in report["answers"])

    tracker = Tracker.open(config)
    client = MlflowClient(tracker.uri)
    runs = client.search_runs([tracker.experiment_id], "tags.`hydra_heads.stage` = 'train'")
    assert sorted(run.data.tags["hydra_heads.part"] for run in runs) == sorted(f"small.share{share:g}.seed1" for share in SHARES)
    assert {run.info.status for run in runs} == {"FINISHED"}
    metrics = client.get_run(str(result.run_id)).data.metrics
    assert metrics["small.tokens_per_step"] == pytest.approx(figures["tokens_per_step"], abs=1e-4)
    assert metrics["small.at_4x.low"] <= metrics["small.at_4x"] <= metrics["small.at_4x.high"]
    assert {one.path for one in client.list_artifacts(str(result.run_id))} >= {"report.md", "report.json", "curve.png"}
    assert run_curve(config).skipped
