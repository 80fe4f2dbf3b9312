"""Heads and configurations as MLflow's models: found by a search, loaded in a fresh process; what is told when one is gone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.decoding import Engine
from hydra_core.errors import InputError
from pipelines.config import RunConfig, load_config
from pipelines.generate.pyfunc import _load_pyfunc, texts_of
from pipelines.runtime.artifacts import StageResult, stage_folder
from pipelines.tracking import NotRegistered, RunReader, Tracker, resolve
from pipelines.tracking.client import AwayError
from pipelines.tracking.models import OUTPUT, PREFIX, best_models, finish_model, heads_model, model_of
from tests.conftest import ROOT
from tests.pipelines.tracking.chain import QUESTIONS, record_chain

CHAMPION = "models:/hydra-heads@champion"


def config_for(storage: Path, base: Path, uri: str, **more: str) -> RunConfig:
    given = {"storage": str(storage), "tracking.uri": uri, "base.model": str(base), "base.dtype": "fp32"}
    return load_config(None, given | more)


def test_models_of_a_chain(storage: Path, tiny_base: Base, tiny_base_dir: Path, store: str, tmp_path: Path) -> None:
    """On SQLite and on PostgreSQL: what a search finds, what a version says, and one line for each thing that is gone."""
    config = config_for(storage, tiny_base_dir, store)
    record_chain(config, tiny_base, tmp_path / "heads", {"medusa": 1.4, "hydra": 1.8})
    client = MlflowClient(store)
    best = best_models(config, QUESTIONS[0], QUESTIONS[1][:36])
    assert [model.name for model in best] == ["default hydra", "default medusa"] and best_models(config, "other questions") == []
    assert {str(model.status) for model in best} == {"READY"} and best[0].params["heads.kind"] == "hydra"
    assert {(metric.key, metric.dataset_name) for metric in best[0].metrics} >= {("tokens_per_step", "features"),
                                                                                ("tokens_per_step", "spec-bench")}

    version = client.get_model_version_by_alias("hydra-heads", "champion")
    assert version.source.startswith(PREFIX) and version.tags["base_digest"] == tiny_base.identity.digest
    assert version.tags["drafter"] == "hydra" and version.tags["hardware"] and version.tags["previous_champion"] == "none"
    model = client.get_logged_model(version.source.removeprefix(PREFIX))
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "hydra-heads", "version": "1"}]
    assert best[0].tags["mlflow.user"] and best[0].tags["mlflow.source.name"] == "hydra-heads train"
    chain = client.get_run(Tracker.open(config).parent())
    assert chain.data.tags["champion"] == "hydra (version 1)" and chain.data.metrics["speed_vs_plain"] == 1.8
    assert chain.inputs.dataset_inputs[0].dataset.name == "spec-bench" and chain.outputs.model_outputs
    assert "| bench |" in chain.data.tags["mlflow.note.content"] and chain.data.metrics["device_seconds"] > 0

    number, folder = resolve(config, CHAMPION, tmp_path / "downloads")
    assert number == 1 and (folder / "configuration.json").is_file() and (folder.parent / "MLmodel").is_file()
    assert json.loads((folder.parent / "provenance.json").read_text(encoding="utf-8")) == {"made": "by a test"}
    assert not [path for path in folder.parent.rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]
    with pytest.raises(NotRegistered, match=r"^serve\.model=models:/hydra-heads@nobody: is not registered"):
        resolve(config, "models:/hydra-heads@nobody", tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"^serve\.model=models:/hydra-heads@champion: version 1 lay in .*, which is gone"):
        resolve(config, CHAMPION, tmp_path)
    client.delete_logged_model(version.source.removeprefix(PREFIX))
    with pytest.raises(InputError, match=r"version 1 points at the model m-\w+, which was deleted: run `hydra-heads promote`"):
        resolve(config, CHAMPION, tmp_path)

    client.delete_experiment(Tracker.open(config).experiment_id)
    with pytest.raises(InputError, match=r"^tracking\.experiment=hydra-heads: was deleted: restore it"):
        Tracker.open(config)


def test_a_training_that_fails_leaves_a_failed_model(storage: Path, tiny_base_dir: Path, tmp_path: Path) -> None:
    config = config_for(storage, tiny_base_dir, f"sqlite:///{tmp_path}/mlflow.db")
    tracker = Tracker.open(config)
    with pytest.raises(RuntimeError, match="loss"), tracker.start("train", part="hydra", fingerprint="f") as run, \
            heads_model(run, config, "hydra") as model:
        raise RuntimeError("the loss is not finite")
    assert str(MlflowClient(tracker.uri).get_logged_model(model.model_id).status) == "FAILED"
    with tracker.start("train", part="hydra", fingerprint="f") as run, heads_model(run, config, "hydra") as again:
        assert again.model_id == model.model_id  # a training that goes on goes on with its model
        (tmp_path / "heads").mkdir()
        (tmp_path / "heads" / "config.json").write_text("{}", encoding="utf-8")
        again.finish(config, tmp_path / "heads")
    assert str(MlflowClient(tracker.uri).get_logged_model(model.model_id).status) == "READY"


def test_heads_that_could_not_be_stored_are_stored_by_the_next_stage(storage: Path, tiny_base_dir: Path, tmp_path: Path) -> None:
    config = config_for(storage, tiny_base_dir, f"sqlite:///{tmp_path}/mlflow.db")
    folder = storage / "runs" / "default" / "train" / "hydra"
    tracker = Tracker.open(config)
    with tracker.start("train", part="hydra") as run, heads_model(run, config, "hydra") as model, \
            stage_folder(config, "train", folder, "f") as stage:
        (folder / "heads").mkdir()
        (folder / "heads" / "config.json").write_text("{}", encoding="utf-8")
        stage.finish(StageResult("train", run.run_id, {"heads": str(folder / "heads"), OUTPUT: model.uri}, {}),
                     [folder / "heads" / "config.json"])
    client = MlflowClient(tracker.uri)
    assert str(client.get_logged_model(model.model_id).status) == "PENDING"
    with tracker.start("tree", part="hydra") as run:
        assert model_of(run, config, folder / "heads") is not None and model_of(run, config, tmp_path / "heads") is None
    assert str(client.get_logged_model(model.model_id).status) == "READY"
    assert client.get_run(run.run_id).inputs.model_inputs[0].model_id == model.model_id


def test_a_registry_of_its_own(storage: Path, tiny_base: Base, tiny_base_dir: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in one store, versions in another: by the setting and by MLflow's own variable."""
    registry = f"sqlite:///{tmp_path}/registry.db"
    config = config_for(storage, tiny_base_dir, f"sqlite:///{tmp_path}/mlflow.db", **{"tracking.registry_uri": registry})
    record_chain(config, tiny_base, tmp_path / "heads", {"hydra": 1.8})
    assert resolve(config, CHAMPION, tmp_path)[1].is_dir()
    without = config_for(storage, tiny_base_dir, f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(NotRegistered):
        resolve(without, CHAMPION, tmp_path)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", registry)
    assert resolve(without, CHAMPION, tmp_path)[0] == 1


def test_names_are_matched_exactly(storage: Path, tiny_base_dir: Path, tmp_path: Path) -> None:
    """`_` is no wildcard, also in runs of earlier versions, which have no tag for the name alone."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    ids = {}
    for name in ("run_b", "runab"):
        with Tracker.open(config_for(storage, tiny_base_dir, uri, name=name)).start("bench") as run:
            ids[name] = run.run_id
    config = config_for(storage, tiny_base_dir, uri)
    reader = RunReader.open(config)
    for name, run_id in ids.items():
        assert [bench.run_id for bench in reader.find(name).finished("bench")] == [run_id]
    for run_id in ids.values():
        MlflowClient(uri).delete_tag(run_id, "hydra_heads.name")
    assert [bench.run_id for bench in reader.find("run_b").finished("bench")] == [ids["run_b"]]


@pytest.mark.slow
def test_mlflow_loads_the_champion_in_a_fresh_process(storage: Path, tiny_base: Base, tiny_base_dir: Path,
                                                      tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    record_chain(config_for(storage, tiny_base_dir, uri), tiny_base, tmp_path / "heads", {"hydra": 1.8})
    script = ("import json, sys, mlflow; model = mlflow.pyfunc.load_model('models:/hydra-heads@champion'); "
              "print(json.dumps(model.predict(json.loads(sys.argv[1]), params={'max_new_tokens': 12})))")
    questions = ["What is a draft tree?", "Count to ten."]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "HYDRA_HEADS_STORAGE": str(storage), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(questions)], cwd=tmp_path, env=environment, timeout=600,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == Engine(tiny_base).answer(questions, max_new_tokens=12)


def test_a_base_that_is_not_here_is_named(storage: Path, tiny_base: Base, tiny_base_dir: Path, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_HEADS_STORAGE", str(storage))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = config_for(storage, tiny_base_dir, f"sqlite:///{tmp_path}/mlflow.db")
    record_chain(config, tiny_base, tmp_path / "heads", {"hydra": 1.8})
    folder = str(resolve(config, CHAMPION, tmp_path)[1])
    with pytest.raises(InputError, match=rf"^base \S+ \({tiny_base.identity.digest[:16]}\): is not available here \(.*"
                                         r"/nowhere: no such folder.*\): set HYDRA_HEADS_BASE to its folder, or load with"):
        _load_pyfunc(folder, {"base_model": "/nowhere"})
    assert texts_of("a") == ["a"] and texts_of(["a", "b"]) == ["a", "b"]
    with pytest.raises(InputError, match="row 1: is int, not a text"):
        texts_of(["a", 2])


def test_a_server_that_goes_away_costs_no_work(storage: Path, tiny_base_dir: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What only MLflow's pages show is sent when it answers again; heads are stored by the next stage that reads them."""
    def away(*_: object, **__: object) -> None:
        raise AwayError("tracking.uri=http://h: the MLflow server does not answer any more")

    config = config_for(storage, tiny_base_dir, f"sqlite:///{tmp_path}/mlflow.db")
    run = Tracker.open(config).start("train", part="hydra")
    with heads_model(run, config, "hydra") as model, monkeypatch.context() as patch:
        for call in ("get_logged_model", "log_batch", "log_inputs"):
            patch.setattr(run.client._client, call, away)  # type: ignore[attr-defined]
        finish_model(model, config, tmp_path)
        run.log_model_metrics(model.model_id, {"tokens_per_step": 2.0}, "features", "f")
        run.log_headline({"rows": 2})
    assert "the heads are not stored in MLflow yet" in capsys.readouterr().err
    run.end()
    assert run.client.get_run(run.run_id).data.metrics["tokens_per_step"] == 2.0
    assert run.client.get_run(Tracker.open(config).parent()).data.metrics["rows"] == 2.0
