"""Real MLflow on SQLite."""

from __future__ import annotations

import re
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient

from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig, load_config
from pipelines.runtime.programs import program
from pipelines.tracking import Tracker, flatten, metric_logger, register, resolve, tracking_uri
from pipelines.tracking.search import RunReader
from tests.conftest import ROOT


@pytest.fixture
def config(storage: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return load_config(None, {"storage": str(storage), "name": "chain"})


def test_children_under_one_parent(config: RunConfig, tmp_path: Path) -> None:
    tracker = Tracker.open(config)
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with tracker.start("train", part="hydra++", params=config.model_dump(mode="json"), fingerprint="f1") as run:
        run.log_metrics({"hydra++.loss": 2.0}, step=3)
        run.log_dataset("features", "d" * 64, "/data", "training")
        run.log_artifact(tmp_path / "a.txt")
    metric_logger(tracker.uri, run.run_id).log({"loss": 1.5}, step=4)
    client = MlflowClient(tracker.uri)
    seen = client.get_run(run.run_id)
    assert seen.info.status == "FINISHED" and seen.data.tags["mlflow.parentRunId"] == tracker.parent()
    assert Tracker.open(config).parent() == tracker.parent()
    assert seen.data.params["train.rows_per_step"] == "16" and seen.data.metrics["hydra_pp.loss"] == 2.0
    assert seen.inputs.dataset_inputs[0].dataset.name == "features"
    assert seen.info.artifact_uri.startswith((Path(config.storage) / "mlflow" / "artifacts").as_uri())
    assert tracking_uri(config) == f"sqlite:///{config.storage}/mlflow/mlflow.db"


@pytest.mark.parametrize(("uri", "given"), [
    ("postgresql://host/x", True), ("mysql+pymysql://host/x", True), ("sqlite:////data/x.db", True), ("http://host:5000", False),
    ("https://host", False), ("databricks", False), ("databricks://profile", False)])
def test_artifacts_of_a_database_lie_in_the_storage(config: RunConfig, monkeypatch: pytest.MonkeyPatch, uri: str,
                                                    given: bool) -> None:
    """MLflow's own place for them is the folder in which a process happens to run; a server has one of its own."""
    asked: list[str | None] = []
    monkeypatch.setattr(Tracker, "_prepare", lambda self: None)
    client = SimpleNamespace(get_experiment_by_name=lambda name: None,
                             create_experiment=lambda name, artifact_location: asked.append(artifact_location))
    monkeypatch.setattr("pipelines.tracking.runs.open_client", lambda uri: client)
    Tracker.open(load_config(None, {"storage": config.storage, "tracking.uri": uri}))
    assert asked == [(Path(config.storage) / "mlflow" / "artifacts").as_uri() if given else None]


def test_failed_run_is_taken_up_again(config: RunConfig) -> None:
    tracker = Tracker.open(config)
    with pytest.raises(RuntimeError), tracker.start("train", params={"a": 1}, fingerprint="f") as first:
        raise RuntimeError
    with tracker.start("train", params={"a": 2, "b": 3}, fingerprint="f") as second:  # params are immutable
        assert second.run_id == first.run_id
    assert tracker.start("train", fingerprint="f").run_id != first.run_id
    assert tracker.start("train", fingerprint="other").run_id != first.run_id


def test_registry(config: RunConfig, tmp_path: Path) -> None:
    tracker = Tracker.open(config)
    versions = []
    for text in ("one", "two"):
        folder = tmp_path / text
        folder.mkdir()
        (folder / "f").write_text(text, encoding="utf-8")
        with tracker.start("promote") as run:
            run.log_artifact(folder, "configuration")
            versions.append(register(config, "heads", run, "configuration", "champion", {"drafter": text}))
    version, found = resolve(config, "models:/heads@champion", tmp_path / "download")
    assert (version, (found / "f").read_text(encoding="utf-8")) == (versions[1], "two")
    version, found = resolve(config, f"models:/heads/{versions[0]}", tmp_path / "download")
    assert (version, (found / "f").read_text(encoding="utf-8")) == (versions[0], "one")
    for uri in ("models:/heads@nobody", "models:/nothing/1", "heads", "models:/heads"):
        with pytest.raises(InputError, match=r"serve\.model"):
            resolve(config, uri, tmp_path)


@pytest.mark.timeout(100)  # MLflow itself would try for many minutes
@pytest.mark.parametrize("scheme", ["http", "postgresql", "mysql+pymysql"])
def test_a_dead_server_is_told_at_once(config: RunConfig, scheme: str) -> None:
    with pytest.raises(StoppedError, match=rf"tracking\.uri={re.escape(scheme)}://127\.0\.0\.1:9.*refused"):
        Tracker.open(load_config(None, {"storage": config.storage, "tracking.uri": f"{scheme}://u:secret@127.0.0.1:9/x"}))


@pytest.mark.timeout(100)
def test_a_server_that_takes_connections_and_says_nothing(config: RunConfig) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(StoppedError, match="no MLflow server answers there"):
            Tracker.open(load_config(None, {"storage": config.storage,
                                            "tracking.uri": f"http://127.0.0.1:{silent.getsockname()[1]}"}))


def test_a_store_of_no_known_kind(config: RunConfig) -> None:
    for uri in ("nonsense://x", "postgresql://host:port/x"):
        with pytest.raises(InputError, match=r"tracking\.uri="):
            Tracker.open(load_config(None, {"storage": config.storage, "tracking.uri": uri}))


def test_every_run_holds_its_settings(config: RunConfig) -> None:
    """As parameters those that its stage reads, all of them as an artifact."""
    secret = config.model_copy(update={"promote": config.promote.model_copy(update={"alias": "http://me:hunter2@x"})})
    tracker = Tracker.open(secret)
    with tracker.start("promote") as run:
        pass
    client = MlflowClient(tracker.uri)
    params = client.get_run(run.run_id).data.params
    assert params["promote.min_gain"] == "1.0" and params["name"] == "chain" and "hunter2" not in str(params)
    assert {name.split(".")[0] for name in params} == {"name", "base", "promote"}
    text = Path(client.download_artifacts(run.run_id, "config.yaml", config.storage)).read_text(encoding="utf-8")
    assert "repeats: 5" in text and "hunter2" not in text
    with tracker.start("train", part="hydra++") as trained:
        pass
    params = client.get_run(trained.run_id).data.params
    assert params["train.lr"] == "0.001" and params["heads.kind"] == "hydra++" and "train.drafters" not in str(params)
    reader = RunReader.open(secret)
    record = reader.get(trained.run_id)
    assert record is not None
    found = reader.complete(record).params
    assert found["tree.repeats"] == "5" and found["train.drafters.hydra++.kind"] == "hydra++" and found["train.lr"]


def test_the_parent_runs_while_a_child_does(config: RunConfig) -> None:
    tracker = Tracker.open(config)
    client = MlflowClient(tracker.uri)
    status = lambda: client.get_run(tracker.parent()).info.status  # noqa: E731
    assert status() == "FINISHED"  # a stage that was skipped leaves it so
    with tracker.start("train"):
        assert status() == "RUNNING"
    assert status() == "FINISHED"
    with pytest.raises(RuntimeError), tracker.start("tree"):
        raise RuntimeError
    assert status() == "FAILED"
    with tracker.start("tree"):
        pass
    tracker.end_parent("FAILED")
    assert status() == "FAILED" and Tracker.open(config).parent() == tracker.parent()


def test_programs_of_an_environment_that_is_not_on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = tmp_path / "bin"
    here.mkdir()
    (here / "tool").write_text("#!/bin/sh\n", encoding="utf-8")
    (here / "tool").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(here / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert program("tool") == [str(here / "tool")]
    monkeypatch.setenv("PATH", f"{here}:/usr/bin")
    assert program("tool") == ["tool"]
    assert program("other", "package.tool") == [str(here / "python"), "-m", "package.tool"]


def test_environment_names_the_server(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere.db")
    assert tracking_uri(config) == "sqlite:////elsewhere.db"


def test_flatten_hides_secrets_and_cuts_long_values() -> None:
    flat = flatten({"a": {"api_key": "s3cret", "text": "x" * 900}, "n": None})
    assert flat["a.api_key"] == "(hidden)" and len(flat["a.text"]) == 500 and flat["n"] == "None"


def test_several_first_starts_at_once(storage: Path) -> None:
    """Each would make the tables of one new SQLite file, which then stayed broken for good."""
    script = ("import sys; from pipelines.config import load_config; from pipelines.tracking import Tracker; "
              "print(Tracker.open(load_config(None, {'storage': sys.argv[1], 'name': sys.argv[2]})).parent())")
    started = [subprocess.Popen([sys.executable, "-c", script, str(storage), f"r{number}"], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in range(3)]
    ended = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended
    assert len({out.strip() for out, _ in ended}) == 3


def test_a_busy_database_is_waited_for(config: RunConfig) -> None:
    Tracker.open(config)
    path = tracking_uri(config).removeprefix("sqlite:///")
    held = sqlite3.connect(path, check_same_thread=False)
    held.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(8.0, held.rollback)  # longer than SQLite itself waits
    timer.start()
    assert Tracker.open(config).experiment_id
    timer.join()


def test_tables_that_were_left_half_made_are_named(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a file stays broken for good: the line names it."""
    def fail(**_: str) -> None:
        raise RuntimeError("(sqlite3.OperationalError) table _alembic_tmp_latest_metrics already exists")

    monkeypatch.setattr("pipelines.tracking.client.MlflowClient", fail)
    with pytest.raises(InputError, match=r"an interrupted first start left its tables half-made .*: delete /.*mlflow\.db"):
        Tracker.open(config)
