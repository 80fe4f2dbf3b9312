"""A real MLflow server that dies: nothing that was logged is lost, nothing is there twice, and the work goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import as_path
from pipelines.config import RunConfig, load_config
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.hardware import this_hardware
from pipelines.tracking import Tracker, log_or_keep, register
from pipelines.tracking import spool as module
from pipelines.tracking.client import AwayError
from pipelines.tracking.spool import Spool, _folders, send_unsent, unsent_folder
from pipelines.train.stage import run_train
from tests.mlflow_server import Link, MlflowServer
from tests.mlflow_server import mlflow_server as running_mlflow_server
from tests.pipelines.synthetic import write_distilled
from tests.pipelines.tracking.conftest import PostgreSQL
from tests.pipelines.train.test_stage import curve_of, make_config, saved_steps
from tests.processes import until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with running_mlflow_server(tmp_path_factory.mktemp("mlflow")) as found:
        yield found


@pytest.fixture
def link(server: MlflowServer) -> Iterator[Link]:
    found = Link(server.port)
    found.mend()
    yield found
    found.cut()


@pytest.fixture
def config(link: Link, storage: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(module, "SEND_SECONDS", 0.3)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # seconds less for each outage
    return load_config(None, {"storage": str(storage), "name": storage.parent.name, "tracking.uri": link.address})


def kept(config: RunConfig) -> list[Path]:
    return [path for path in unsent_folder(config).glob("[0-9]*") if path.is_dir()]


def points(server: MlflowServer, run_id: str, metric: str) -> list[tuple[int, float]]:
    return sorted((one.step, one.value) for one in MlflowClient(server.address).get_metric_history(run_id, metric))


def artifacts(server: MlflowServer, run_id: str, path: str | None = None) -> set[str]:
    return {one.path for one in MlflowClient(server.address).list_artifacts(run_id, path)}


def log_everything(run: Any, folder: Path) -> None:
    (folder / "heads").mkdir()
    (folder / "heads" / "a.txt").write_text("a", encoding="utf-8")
    (folder / "curve.txt").write_text("first", encoding="utf-8")
    run.log_curve([(step, {"loss": 9.0 - step, "odd": float("nan")}) for step in range(1, 4)], [1e9 + step for step in range(3)])
    run.log_params({"later": {"a": 1}})
    run.set_tags({"hydra_heads.note": "first"})
    run.set_tags({"hydra_heads.note": "second"})
    run.log_dataset("rows", "d" * 64, "/data", "training")
    run.log_artifact(folder / "heads", "heads")
    run.log_artifact(folder / "curve.txt")
    run.log_text("text", "notes/a.md")
    (folder / "curve.txt").write_text("changed since", encoding="utf-8")


def check_everything(server: MlflowServer, run_id: str) -> None:
    found = MlflowClient(server.address).get_run(run_id)
    assert points(server, run_id, "loss") == [(step, 9.0 - step) for step in range(4)]
    assert len(points(server, run_id, "odd")) == 3
    assert found.data.params["later.a"] == "1" and found.data.tags["hydra_heads.note"] == "second"
    assert [one.dataset.name for one in found.inputs.dataset_inputs] == ["rows"]
    assert {"heads", "curve.txt", "notes"} <= artifacts(server, run_id) and artifacts(server, run_id, "heads") == {"heads/a.txt"}
    folder = server.folder / "artifacts" / found.info.experiment_id / run_id / "artifacts"
    assert (folder / "curve.txt").read_text(encoding="utf-8") == "first"  # as it was when it was logged
    assert found.info.status == "FINISHED"


def test_a_server_that_comes_back_has_it_all_in_a_while(server: MlflowServer, link: Link, config: RunConfig,
                                                        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker.open(config)
    run = tracker.start("train")
    run.log_metrics({"loss": 9.0}, 0)
    link.cut()
    log_everything(run, tmp_path)
    said = capsys.readouterr().err
    (folder,) = kept(config)
    assert said.count("the work goes on, and what it would log is kept in") == 1 and str(folder) in said
    link.mend()
    until(lambda: not folder.exists())  # in the background, while the work goes on
    assert "MLflow answers again: 8 records were sent" in capsys.readouterr().err
    run.end()
    check_everything(server, run.run_id)
    assert not unsent_folder(config).exists() and tracker.parent()
    tracker.end_parent("FINISHED")
    assert capsys.readouterr().out == "", "stdout is for results"


def test_a_database_that_stops_behind_a_server(postgresql_server: PostgreSQL, mlflow_server: Callable[[str], str],
                                               config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """MLflow answers meanwhile, that it cannot."""
    address = mlflow_server(postgresql_server.address)
    tracker = Tracker.open(config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": address})}))
    run = tracker.start("train")
    run.log_metrics({"loss": 9.0}, 0)
    postgresql_server.stop()
    try:
        run.log_curve([(step, {"loss": 9.0 - step}) for step in range(1, 4)], [1e9 + step for step in range(3)])
        run.set_tags({"hydra_heads.note": "kept"})
        run.log_text("text", "notes/a.md")
        (folder,) = kept(config)
        assert "the work goes on, and what it would log is kept in" in capsys.readouterr().err
    finally:
        postgresql_server.start()
    until(lambda: not folder.exists(), 120)
    run.end()
    client = MlflowClient(address)
    found = client.get_run(run.run_id)
    assert sorted((one.step, one.value) for one in client.get_metric_history(run.run_id, "loss")) == [
        (step, 9.0 - step) for step in range(4)]
    assert found.data.tags["hydra_heads.note"] == "kept" and found.info.status == "FINISHED"
    assert [one.path for one in client.list_artifacts(run.run_id, "notes")] == ["notes/a.md"]


def test_a_server_that_stays_away_gets_it_from_the_next_command(server: MlflowServer, link: Link, config: RunConfig,
                                                                tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker.open(config)
    with tracker.start("train") as run:
        run.log_metrics({"loss": 9.0}, 0)
        link.cut()
        log_everything(run, tmp_path)
        with pytest.raises(StoppedError, match=r"has not got all of run"):
            run.require_sent()
    ended = round(1000 * time.time())
    (folder,) = kept(config)
    said = capsys.readouterr().err
    assert f"refused>): 9 records of run {run.run_id} are kept in {folder}: the next command of this run sends them" in said
    assert tracker.parent()  # what a stage asks for at its end
    with pytest.raises(StoppedError, match="no MLflow server answers there"):
        Tracker.open(config)  # a start is told within seconds, as before
    with (folder / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "metrics", "met')  # a process was killed while it wrote
    link.mend()
    (folder / "sent").write_text("2", encoding="utf-8")  # as many had been sent, before another end
    send_first_two(server, run.run_id, folder)
    other = load_config(None, {"storage": config.storage, "name": config.name})
    Tracker.open(other)  # another store: these are not its own
    assert folder.exists()
    Tracker.open(config)
    assert f"9 records that were kept in {folder} are in MLflow now" in capsys.readouterr().err
    check_everything(server, run.run_id)
    assert MlflowClient(server.address).get_run(run.run_id).info.end_time <= ended
    assert not unsent_folder(config).exists()
    Tracker.open(config)
    assert capsys.readouterr().err == ""


def send_first_two(server: MlflowServer, run_id: str, folder: Path) -> None:
    from pipelines.tracking.client import open_client
    from pipelines.tracking.records import send_record

    for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()[:2]:
        for _ in range(2):  # a second time it changes nothing
            send_record(open_client(server.address), run_id, json.loads(line))


def test_what_a_run_that_was_deleted_is_owed_stays_and_stops_nobody(
        server: MlflowServer, link: Link, config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker.open(config)
    with tracker.start("train") as run:
        link.cut()
        run.log_metrics({"loss": 1.0})
    link.mend()
    MlflowClient(server.address).delete_run(run.run_id)
    capsys.readouterr()
    Tracker.open(config).start("train")
    (folder,) = kept(config)
    assert f"{folder}: what is kept there cannot be sent (tracking.uri={link.address}: the run {run.run_id} was deleted" in (
        capsys.readouterr().err)


def test_what_a_living_process_keeps_is_left_to_it(
        server: MlflowServer, link: Link, config: RunConfig, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "SEND_SECONDS", 1e6)
    run = Tracker.open(config).start("train")
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    run.log_artifact(tmp_path / "a.txt", "heads")
    link.cut()
    run.log_metrics({"loss": 1.0})
    link.mend()
    capsys.readouterr()
    Tracker.open(config)
    assert len(kept(config)) == 1 and capsys.readouterr().err == ""
    with pytest.raises(Exception, match="Registered Model"):
        MlflowClient(server.address).get_registered_model("heads")
    register(config, "heads", run, "heads", "champion", {})  # sends first what it refers to
    assert points(server, run.run_id, "loss") == [(0, 1.0)]
    run.end()
    assert not unsent_folder(config).exists()


def test_a_worker_leaves_to_the_driver_what_it_cannot_send(server: MlflowServer, link: Link, config: RunConfig) -> None:
    run = Tracker.open(config).start("train")
    log_or_keep(config, link.address, run.run_id, {"decoded": 1.0}, 5)
    link.cut()
    log_or_keep(config, link.address, run.run_id, {"decoded": 2.0}, 10)
    assert len(kept(config)) == 1
    link.mend()
    run.end()
    assert points(server, run.run_id, "decoded") == [(5, 1.0), (10, 2.0)] and not unsent_folder(config).exists()


def test_a_refusal_is_no_absence(config: RunConfig, storage: Path) -> None:
    """A store that will never take a record is told at once."""
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "denied")

    info = SimpleNamespace(info=SimpleNamespace(artifact_uri="/root"))
    spool = Spool(config.tracking.uri or "", SimpleNamespace(log_text=refuse, get_run=lambda run_id: info),  # type: ignore[arg-type]
                  "r", unsent_folder(config), storage)
    with pytest.raises(InputError, match="artifacts cannot be stored in /root"):
        spool.put({"kind": "text", "text": "", "file": "a"})
    spool.close()
    assert not unsent_folder(config).exists() and issubclass(AwayError, StoppedError)


def test_it_may_lie_in_an_object_store(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that answers, but takes nothing for a while: its disk is full."""
    monkeypatch.setattr(module, "SEND_SECONDS", 1e6)
    config = load_config(None, {"storage": f"{s3}/storage", "tracking.uri": "http://127.0.0.1:9"})
    got: list[Any] = []

    def take(*given: Any, **more: Any) -> None:
        if away:
            raise AwayError("its disk is full")
        got.append(sorted(path.name for path in Path(given[1]).iterdir()) if len(given) > 1 else more["metrics"][0].value)

    away, client = True, SimpleNamespace(log_batch=take, log_artifacts=take)
    where = unsent_folder(config), as_path(config.storage)
    spool = Spool("sqlite:////nowhere/mlflow.db", client, "r", *where)  # type: ignore[arg-type]
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "a.txt").write_text("a", encoding="utf-8")
    spool.put({"kind": "metrics", "metrics": [["loss", 1.0, 0, 0]]})
    spool.put({"kind": "artifact", "artifact_path": None}, tmp_path / "heads")
    spool.put({"kind": "metrics", "metrics": [["loss", 2.0, 0, 1]]})
    assert not spool.send() and not got
    spool.close()
    (folder,) = _folders(where[0])
    away = False
    send_unsent(config, "sqlite:////other/mlflow.db", client)  # type: ignore[arg-type]
    assert not got
    send_unsent(config, "sqlite:////nowhere/mlflow.db", client)  # type: ignore[arg-type]
    assert got == [1.0, ["a.txt"], 2.0] and not _folders(where[0]) and not folder.exists()


@pytest.mark.drawn
def test_training_goes_on_without_the_server_and_the_next_command_sends_the_rest(
        server: MlflowServer, storage: Path, tiny_base_dir: Path, tiny_base: Base, local_ray: None,
        capsys: pytest.CaptureFixture[str]) -> None:
    """It is killed in the middle, and comes back when the training has ended."""
    config = make_config(tiny_base_dir, storage, "outage", **{"train.max_steps": 20, "train.validate_every": 5,
                                                              "tracking.uri": server.address})
    write_distilled(config, tiny_base)
    killer = threading.Thread(target=lambda: (until(lambda: saved_steps(config, "hydra") >= 5, 800), server.kill()))
    killer.start()
    result = run_train(config)
    killer.join()
    said = capsys.readouterr().err
    (folder,) = kept(config)
    assert not result.skipped and result.figures["hydra"]["device_seconds"] > 0
    assert f"are kept in {folder}: the next command of this run sends them" in said
    assert (RunPaths.of(config).stage("train", "hydra") / "manifest.json").exists()

    server.start()
    again = run_train(config)
    assert again.skipped and not folder.exists() and f"records that were kept in {folder} are in MLflow now" in (
        capsys.readouterr().err)
    run_id = json.loads((RunPaths.of(config).stage("train", "hydra") / "manifest.json").read_text())["result"]["run_id"]
    curve = {record["step"]: record["loss"] for record in curve_of(config, "hydra")}
    assert points(server, run_id, "train.loss") == sorted(curve.items()) and len(curve) == 20
    assert [step for step, _ in points(server, run_id, "held_out.tokens_per_step")] == [5, 10, 15, 20]
    found = MlflowClient(server.address).get_run(run_id)
    assert found.info.status == "FINISHED" and found.data.metrics["best.tokens_per_step"] >= 1
    assert {"curve.jsonl", "config.yaml"} <= artifacts(server, run_id)  # heads: the next stage that reads them stores their model
    assert found.data.tags["hydra_heads.hardware_digest"] == this_hardware().digest
    assert found.data.tags["mlflow.user"] and found.data.tags["hydra_heads.version.torch"]
