"""What the quickstart does around its stages; the chain itself is run in tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from hydra_core.errors import InputError
from pipelines.config import RunConfig, load_config
from pipelines.quickstart import stage as quickstart
from pipelines.runtime.artifacts import RunPaths, StageResult, stage_folder
from pipelines.runtime.files import write_text
from pipelines.runtime.lock import only_run
from pipelines.tracking import Tracker

STAGES = ("distill", "train/medusa", "train/hydra", "tree/medusa", "bench", "promote", "batch")


def finish_all(config: RunConfig) -> dict[str, Path]:
    """Every stage finished, with one output each."""
    outputs = {}
    for name in STAGES:
        folder = RunPaths.of(config).run / name
        with stage_folder(config, name, folder, "f") as stage:
            outputs[name] = folder / "output"
            write_text(outputs[name], name)
            stage.finish(StageResult(name, None, {}, {}), [outputs[name]])
    return outputs


@pytest.mark.parametrize(("changed", "gone"), [
    ("train/hydra", {"tree/medusa", "bench", "promote", "batch"}), ("bench", {"promote", "batch"}),
    ("distill", set()), ("promote", set()), ("batch", set()), (None, set())])
def test_what_was_built_on_a_changed_stage_goes(storage: Path, changed: str | None, gone: set[str]) -> None:
    config = load_config(None, {"storage": str(storage)})
    outputs = finish_all(config)
    if changed:
        outputs[changed].write_text("other", encoding="utf-8")
    quickstart._drop_stale(config)
    assert {name for name, path in outputs.items() if not path.exists()} == gone


def finish_beside(config: RunConfig, stage: str, folder: Path) -> Path:
    """A finished output of another chain in this run."""
    with stage_folder(config, stage, folder, "other") as claimed:
        write_text(folder / "output", "other")
        claimed.finish(StageResult(stage, None, {}, {}), [folder / "output"])
    return folder / "output"


def test_what_another_chain_made_in_the_run_stays(storage: Path) -> None:
    """Drafters, benches and partitions that these settings do not ask for, damaged or not."""
    config = load_config(None, {"storage": str(storage)})
    paths = RunPaths.of(config)
    outputs = finish_all(config)
    benches = load_config(None, {"storage": str(storage), "bench.limit": 3})
    others = [finish_beside(config, "train", paths.stage("train", "mine")),
              finish_beside(config, "tree", paths.stage("tree", "mine")),
              finish_beside(benches, "bench", paths.stage("bench") / "mine-0a1b2c3d"),
              finish_beside(benches, "promote", paths.stage("promote") / "mine-0a1b2c3d"),
              finish_beside(config, "batch", paths.stage("batch", "2026-01-31"))]
    for path in others:
        path.write_text("changed", encoding="utf-8")
    quickstart._drop_stale(config)
    assert all(path.exists() for path in (*outputs.values(), *others))
    outputs["train/hydra"].write_text("changed", encoding="utf-8")
    quickstart._drop_stale(config)
    assert all(path.exists() for path in others) and not any(outputs[name].exists() for name in ("bench", "promote", "batch"))
    with pytest.raises(RuntimeError), stage_folder(config, "batch", paths.stage("batch"), "again"):  # the place is free
        raise RuntimeError
    assert all(path.exists() for path in others) and not (paths.stage("batch") / "claim.json").exists()


def test_a_folder_that_another_run_works_in_is_not_deleted(storage: Path) -> None:
    config = load_config(None, {"storage": str(storage)})
    outputs = finish_all(config)
    outputs["bench"].write_text("changed", encoding="utf-8")
    with only_run(RunPaths.of(config).stage("batch"), storage), pytest.raises(InputError, match="/batch: another run writes"):
        quickstart._drop_stale(config)
    assert outputs["batch"].exists()


def test_a_bench_without_single_requests_is_told_at_once(storage: Path) -> None:
    with pytest.raises(InputError, match=r"^bench\.single=false: the champion is chosen by"):
        quickstart.run_quickstart(load_config(None, {"storage": str(storage), "bench.single": False}))
    assert not (storage / "mlflow").exists()


def test_two_at_once(storage: Path) -> None:
    config = load_config(None, {"storage": str(storage)})
    with only_run(RunPaths.of(config).run / "quickstart", storage), \
            pytest.raises(InputError, match=r"^/.*/runs/default/quickstart: another run writes to it \(process \d+"):
        quickstart.run_quickstart(config)
    assert not (storage / "runs").exists()


@pytest.mark.slow
def test_a_chain_that_fails_does_not_go_on_running(local_ray: None, tiny_base_dir: Path, storage: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, {"storage": str(storage), "base.model": str(tiny_base_dir), "serve.port": 0})

    def good(config: RunConfig) -> StageResult:
        with Tracker.open(config).start("distill") as run:
            return StageResult("distill", run.run_id, {}, {})

    def bad(config: RunConfig) -> StageResult:
        raise RuntimeError("before its run was started")

    shown: list[RunConfig] = []
    monkeypatch.setattr(quickstart, "show_first_answers", shown.append)
    monkeypatch.setattr(quickstart, "CHAIN", (("distill", good), ("train", bad)))
    with pytest.raises(RuntimeError, match="before its run"):
        quickstart.run_quickstart(config)
    assert shown == [config]
    tracker = Tracker.open(config)
    assert MlflowClient(tracker.uri).get_run(tracker.parent()).info.status == "FAILED"
