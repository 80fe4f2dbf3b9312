"""Finding runs by id and by exact name, and reading what they recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from hydra_core.errors import StoppedError
from pipelines.config import load_config
from pipelines.tracking import RunReader, Tracker
from pipelines.tracking import search as searching
from pipelines.tracking.search import given_name, metric_method


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def tracker(storage: Path, name: str, **settings: object) -> Tracker:
    return Tracker.open(load_config(None, {"storage": str(storage), "name": name, **settings}))


def reader(storage: Path, **settings: object) -> RunReader:
    return RunReader.open(load_config(None, {"storage": str(storage), **settings}))


def test_a_chain_with_many_runs_is_read_page_by_page(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first pages hold runs of another name alone, which LIKE takes for this one."""
    monkeypatch.setattr(searching, "AT_ONCE", 2)
    ids = []
    for name in ("a_b", "axb"):
        for stage in ("distill", "tree", "bench"):
            with tracker(storage, name).start(stage) as run:
                ids.append(run.run_id)
    found = reader(storage).find("a_b")
    assert [run.run_id for run in found.runs] == ids[2::-1] and found.parent_id == tracker(storage, "a_b").parent()
    assert [run.run_id for run in found.finished("tree")] == [ids[1]] and found.asked is None


def test_of_two_storages_the_own_one(storage: Path, tmp_path: Path) -> None:
    """Two storages may share one MLflow, and each have a chain of this name."""
    here, there = storage, tmp_path / "there"
    uri = {"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    ids = {}
    for root in (here, there):
        with tracker(root, "one", **uri).start("bench") as run:
            ids[root] = run.run_id
    for root in (here, there):
        assert [run.run_id for run in reader(root, **uri).find("one").runs] == [ids[root]]
    assert [run.run_id for run in reader(tmp_path / "third", **uri).find("one").runs] == [ids[there]]  # the latest


def test_the_whole_configuration_comes_from_the_artifact(storage: Path) -> None:
    """Under the names that a user gives, with what the stage logged beside it; a broken one is as if there were none."""
    with tracker(storage, "one", **{"train.lr": 5e-4, "bench.max_batch_size": 7}).start(
            "train", part="hydra++", params={"serves": "x"}) as run:
        run.log_dataset("features", "d" * 50, "/rows", "training")
    archive = reader(storage)
    found = archive.get(run.run_id)
    assert found is not None and (found.stage, found.part, found.name) == ("train", "hydra++", "one")
    assert [(one.name, one.digest, one.path) for one in found.inputs] == [("features", "d" * 36, "/rows")]
    params = archive.complete(found).params
    assert (params["train.lr"], params["bench.max_batch_size"], params["serves"]) == ("0.0005", "7", "x")
    assert params["train.drafters.hydra++.kind"] == "hydra++" and "train.learning_rate" not in params
    assert archive.text(run.run_id, "nothing.json") is None and archive.get("0" * 32) is None


def test_names_that_a_user_gives() -> None:
    assert given_name("train.learning_rate") == given_name("train.lr") == "train.lr"
    assert given_name("bench.running_batch") == "bench.max_batch_size" and given_name("name") == "name"
    assert [metric_method(name) for name in ("hydra_pp", "hydra_pp.x", "hydra_pp_8", "my_ppx")] == [
        "hydra++", "hydra++.x", "hydra++_8", "my_ppx"]


def test_what_is_attached_leaves_the_run_as_it_was(storage: Path, tmp_path: Path) -> None:
    own = tracker(storage, "one")
    with own.start("bench"):
        pass
    (tmp_path / "page.html").write_text("page", encoding="utf-8")
    archive, client = reader(storage), MlflowClient(own.uri)
    before = client.get_run(own.parent()).info
    archive.attach(own.parent(), [tmp_path / "page.html"], "comparisons/x")
    assert archive.text(own.parent(), "comparisons/x/page.html") == "page"
    after = client.get_run(own.parent()).info
    assert (after.status, after.end_time) == (before.status, before.end_time)
    client.delete_run(parent := own.parent())
    with pytest.raises(StoppedError, match=f"the run {parent} was deleted"):
        archive.attach(parent, [tmp_path / "page.html"], "comparisons/x")
