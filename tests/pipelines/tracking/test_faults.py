"""A store that refuses or goes away is one line, and costs no training."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE, UNAUTHENTICATED

from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig, load_config
from pipelines.tracking import NotRegistered, Run, Tracker, resolve, ui_command
from pipelines.tracking.client import _has_tables, _line_of, open_client
from pipelines.train.reporting import log_curve, log_rest


@pytest.fixture
def config(storage: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return load_config(None, {"storage": str(storage), "tracking.experiment": "mine"})


def test_a_deleted_experiment_is_told_before_the_work(config: RunConfig) -> None:
    tracker = Tracker.open(config)
    MlflowClient(tracker.uri).delete_experiment(tracker.experiment_id)
    with pytest.raises(InputError, match=rf"^tracking\.experiment=mine: was deleted: restore it \(`mlflow experiments restore "
                                         rf"--experiment-id {tracker.experiment_id}`\) or choose another name$"):
        Tracker.open(config)


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_is_deleted_during_the_work_is_one_line(config: RunConfig, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker.open(config)
    client = MlflowClient(tracker.uri)
    with pytest.raises(StoppedError, match=r"^tracking\.uri=sqlite:.*: the run \w+ was deleted while this command used it: `ml"
                                           r"flow runs restore --run-id \w+`, or run the same command again$"), \
            tracker.start("train") as run:
        client.delete_run(run.run_id) if what == "run" else client.delete_experiment(tracker.experiment_id)
        run.log_metrics({"loss": 1.0})
    assert "tracking: the end of run" in capsys.readouterr().err
    if what == "experiment":
        with pytest.raises(StoppedError, match=rf"the experiment {tracker.experiment_id} was deleted while this command used it"):
            tracker.start("train")


def test_work_that_is_done_stays_so_without_a_record_of_its_end(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker.open(config)
    with tracker.start("train") as run:
        MlflowClient(tracker.uri).delete_run(run.run_id)
    assert f"tracking: the end of run {run.run_id} is not recorded" in capsys.readouterr().err


def test_artifacts_that_cannot_be_stored(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    MlflowClient(Tracker.open(load_config(None, {"storage": config.storage})).uri).create_experiment(
        "mine", artifact_location=(tmp_path / "file" / "art").as_uri())
    with pytest.raises(InputError, match=rf"^tracking\.experiment: its artifacts cannot be stored in \S*{tmp_path}/file/art/\S+ "
                                         r"\(.*Not a directory.*\): choose another tracking\.experiment"):
        Tracker.open(config)  # before any work


@pytest.mark.slow
def test_the_same_lines_of_a_server_on_each_store(storage: Path, store: str, mlflow_server: Callable[[str], str], tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own server on SQLite and on PostgreSQL: what was deleted, what refuses, and an alias that names nothing."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    address = mlflow_server(store)
    client = MlflowClient(address)

    def opened(name: str) -> Tracker:
        return Tracker.open(load_config(None, {"storage": str(storage), "tracking.uri": address, "tracking.experiment": name}))

    client.delete_experiment(opened("gone").experiment_id)
    with pytest.raises(InputError, match=r"^tracking\.experiment=gone: was deleted: restore it"):
        opened("gone")
    tracker = opened("kept")
    with pytest.raises(StoppedError, match=rf"^tracking\.uri={address}: the run \w+ was deleted while this command used it"), \
            tracker.start("train") as run:
        client.delete_run(run.run_id)
        run.log_metrics({"loss": 1.0})
    (tmp_path / "file").write_text("", encoding="utf-8")
    client.create_experiment("refusing", artifact_location=(tmp_path / "file" / "art").as_uri())
    with pytest.raises(InputError, match=r"^tracking\.experiment: its artifacts cannot be stored in .*: choose another"):
        opened("refusing")
    with pytest.raises(NotRegistered, match=r"^serve\.model=models:/nobody@champion: is not registered"):
        resolve(load_config(None, {"storage": str(storage), "tracking.uri": address}), "models:/nobody@champion", tmp_path)


def test_a_version_of_a_remote_store_is_downloaded_once_and_whole(config: RunConfig, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that breaks off leaves nothing that a later run would take for the whole."""
    asked: list[str] = []
    source = "mlflow-artifacts:/1/abc/artifacts/configuration"

    def download(artifact_uri: str, dst_path: str, tracking_uri: str) -> str:
        asked.append(artifact_uri)
        folder = Path(dst_path) / "configuration"
        folder.mkdir()
        (folder / "half").write_text("half", encoding="utf-8")
        if len(asked) == 1:
            raise RuntimeError("Connection broken\nmore")
        (folder / "half").rename(folder / "whole")
        return str(folder)

    version = SimpleNamespace(version="3", source=source)
    monkeypatch.setattr("pipelines.tracking.registry.open_client", lambda *_: SimpleNamespace(
        get_model_version=lambda name, number: version))
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", download)
    with pytest.raises(StoppedError, match=rf"^{source}: cannot be downloaded \(Connection broken\)$"):
        resolve(config, "models:/heads/3", tmp_path / "models")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    for _ in range(2):
        number, folder = resolve(config, "models:/heads/3", tmp_path / "models")
        assert number == 3 and [path.name for path in folder.iterdir()] == ["whole"]
    assert len(asked) == 2
    version.source = source.replace("abc", "def")  # another database
    assert resolve(config, "models:/heads/3", tmp_path / "models")[1] != folder and len(asked) == 3


@pytest.mark.parametrize(("message", "words"), [
    ("The run abc must be in the 'active' state. Current state is deleted.", "the run abc was deleted"),
    ("API request to http://h:1/api/2.0 failed with exception HTTPConnectionPool(host='h')", "does not answer any more"),
    ("API request to http://h:1/api/2.0 failed with timeout exception x", "does not answer any more"),
    ("(psycopg2.OperationalError) server closed the connection unexpectedly", "does not answer any more"),
    ("(sqlite3.OperationalError) database is locked\n[SQL: INSERT", "other processes write to its database"),
    ("Registered Model with name=x not found", None)])
def test_which_faults_are_told(message: str, words: str | None) -> None:
    found = _line_of(message)
    assert found is None if words is None else words in (found or "")


@pytest.mark.parametrize(("error", "refused"), [
    (ModuleNotFoundError("No module named 'psycopg2'"), True), (ValueError("not a uri"), True),
    (PermissionError(13, "denied"), True),
    (MlflowException("who are you", error_code=UNAUTHENTICATED), True),
    (MlflowException("no", error_code=PERMISSION_DENIED), True),
    (MlflowException("API request to endpoint /x failed with error code 403 != 200. Response body: ''"), True),
    (MlflowException('(psycopg2.OperationalError) FATAL: password authentication failed for user "u"'), True),
    (MlflowException("API request to endpoint /x failed with error code 500 != 200. Response body: ''"), False),
    (MlflowException("API request to endpoint /x failed with error code 429 != 200. Response body: ''"), False),
    (MlflowException("(sqlite3.OperationalError) database is locked", error_code=TEMPORARILY_UNAVAILABLE), False),
    (ConnectionResetError(104, "Connection reset by peer"), False), (TimeoutError("timed out"), False)])
def test_what_may_pass_is_no_mistake(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception,
                                     refused: bool) -> None:
    """A fault of the server ends with exit code 1, so that whoever starts commands tries again."""
    def fail(*_: object, **__: object) -> None:
        raise error

    tracker = Tracker.open(config)
    started = tracker.start("train")
    run = Run(started._client, started.run_id)  # one that keeps nothing, as at its start
    kind, words = (InputError, "cannot be") if refused else (StoppedError, "run the same command again")
    (tmp_path / "f").write_text("", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(run._client._client, "log_artifact", fail)
        with pytest.raises(kind, match="choose another|refuses" if refused else words):
            run.log_artifact(tmp_path / "f")
    monkeypatch.setattr("pipelines.tracking.client.why_dead", lambda uri: None)
    monkeypatch.setattr("pipelines.tracking.client.BUSY_SECONDS", -1)
    monkeypatch.setattr("pipelines.tracking.client.MlflowClient", fail)
    with pytest.raises(kind, match=rf"^tracking\.uri=http://host: .*{words}"):
        open_client("http://host")


def test_the_full_disk_of_a_server_is_its_own() -> None:
    full = "API request to http://h failed: (sqlite3.OperationalError) database or disk is full"
    assert "the disk of the MLflow server is full" in (_line_of(full, remote=True) or "")
    assert _line_of("(sqlite3.OperationalError) database or disk is full") is None  # ours: told with what is left


def test_no_line_shows_a_password(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "postgresql://me:hunter2@127.0.0.1:9/x"
    told = _line_of("API request to http://me:hunter2@h:1/api/2.0 failed with exception x")
    assert told is not None and "http://h:1/api/2.0" in told and "hunter2" not in told

    def fail(**_: str) -> None:
        raise RuntimeError(f"Could not parse {secret}")

    monkeypatch.setattr("pipelines.tracking.client.why_dead", lambda uri: None)
    monkeypatch.setattr("pipelines.tracking.client.MlflowClient", fail)
    with pytest.raises((InputError, StoppedError), match=r"postgresql://127\.0\.0\.1:9/x") as caught:
        open_client(secret)
    assert "hunter2" not in str(caught.value)
    shown = ui_command(load_config(None, {"storage": config.storage, "tracking.uri": secret}))
    assert "postgresql://127.0.0.1:9/x" in shown and "hunter2" not in shown


def test_the_lock_of_the_tables_is_for_those_who_make_them(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = Tracker.open(config).uri
    assert _has_tables(uri) and not _has_tables(f"{uri}.other")
    monkeypatch.setattr("pipelines.tracking.client.file_lock", None)
    assert open_client(uri).search_experiments(max_results=1)


def test_another_run_gets_the_whole_curve(config: RunConfig, tmp_path: Path) -> None:
    """A training that goes on in another run, as on another server, leaves no gap there for what the first one has."""
    tracker = Tracker.open(config)
    first, second = tracker.start("train", part="a"), tracker.start("train", part="b")
    context = context_of(config, tmp_path, tracker.uri, first.run_id)
    context.curve, context.next_step = [{"step": step, "time": 0.0, "loss": 9.0} for step in range(2)], 2
    log_curve(context, {"tokens_per_step": 1.5})
    context.settings.run_id = second.run_id
    context.curve.append({"step": 2, "time": 0.0, "loss": 8.0})
    context.next_step = 3
    log_curve(context, {"tokens_per_step": 1.6})
    history = MlflowClient(tracker.uri).get_metric_history
    assert [sorted(point.step for point in history(run.run_id, "train.loss")) for run in (first, second)] == [[0, 1], [0, 1, 2]]
    (tmp_path / "curve.jsonl").write_text("".join(json.dumps(record) + "\n" for record in context.curve), encoding="utf-8")
    third = tracker.start("train", part="c")
    log_rest(third, tmp_path, tmp_path / "curve.jsonl")
    assert sorted(point.step for point in history(third.run_id, "train.loss")) == [0, 1, 2]


def context_of(config: RunConfig, folder: Path, uri: str, run_id: str) -> Any:
    return SimpleNamespace(
        curve=[], next_step=0, settings=SimpleNamespace(tracking_uri=uri, run_id=run_id, folder=str(folder), drafter="hydra"))


def test_a_tracker_that_is_down_costs_no_training(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps and held-out figures of the outage are logged by the next validation, or at the end by the driver, once."""
    tracker = Tracker.open(config)
    run = tracker.start("train")
    context = context_of(config, tmp_path, tracker.uri, run.run_id)
    client = MlflowClient(tracker.uri)

    def validate(uri: str) -> None:
        context.settings.tracking_uri = uri
        context.curve += [{"step": step, "time": 0.0, "loss": 9.0 - step} for step in (context.next_step, context.next_step + 1)]
        context.next_step += 2
        log_curve(context, {"tokens_per_step": 1.0 + context.next_step})

    def logged(metric: str) -> list[tuple[int, float]]:
        return sorted((point.step, point.value) for point in client.get_metric_history(run.run_id, metric))

    down = "http://127.0.0.1:9"
    validate(tracker.uri)
    validate(down)
    assert "step 4: metrics are not logged yet, training goes on (tracking.uri=http://127.0.0.1:9: no MLflow server" in (
        capsys.readouterr().err)
    validate(tracker.uri)
    assert logged("train.loss") == [(step, 9.0 - step) for step in range(6)]
    assert logged("held_out.tokens_per_step") == [(2, 3.0), (4, 5.0), (6, 7.0)]
    validate(down)
    (tmp_path / "curve.jsonl").write_text("".join(json.dumps(record) + "\n" for record in context.curve), encoding="utf-8")
    log_rest(run, tmp_path, tmp_path / "curve.jsonl")
    assert logged("train.loss") == [(step, 9.0 - step) for step in range(8)]
    assert logged("held_out.tokens_per_step")[-1] == (8, 9.0)


def test_a_store_of_artifacts_that_does_not_answer(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library may try for many minutes: the work does not begin, and the line comes before that."""
    over = threading.Event()
    monkeypatch.setattr("pipelines.tracking.runs.PROBE_SECONDS", 0.2)
    monkeypatch.setattr(Run, "log_text", lambda *_: over.wait(60))
    with pytest.raises(StoppedError, match=r"^tracking\.uri=sqlite:\S+: its store of artifacts does not answer within \d+ s: "):
        Tracker.open(config)
    over.set()


def test_a_version_without_files(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server lists a folder that is gone as an empty one."""
    version = SimpleNamespace(version="3", source="mlflow-artifacts:/1/abc/artifacts/configuration")
    monkeypatch.setattr("pipelines.tracking.registry.open_client", lambda *_: SimpleNamespace(
        get_model_version=lambda name, number: version))
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", lambda **_: None)
    with pytest.raises(InputError, match=r"^mlflow-artifacts:\S+: the registered version has no files there \(none were found\): "
                                         r"run `hydra-heads promote` again$"):
        resolve(config, "models:/heads/3", tmp_path / "models")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "storage" not in path.parts]
