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


def test_a_bench_of_other_prompts_is_not_looked_at(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, {"storage": str(storage)})
    outputs = finish_all(config)
    side = RunPaths.of(config).stage("bench") / "mine-0a1b2c3d"
    with stage_folder(config, "bench", side, "other") as stage:
        write_text(side / "output", "side")
        stage.finish(StageResult("bench", None, {}, {}), [side / "output"])
    monkeypatch.setattr(quickstart, "fitting_bench", lambda config: (outputs["bench"].parent, {}))
    (side / "output").write_text("changed", encoding="utf-8")
    quickstart._drop_stale(config)
    assert all(path.exists() for path in outputs.values())
    outputs["bench"].write_text("changed", encoding="utf-8")
    quickstart._drop_stale(config)
    assert not outputs["promote"].exists()


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

    monkeypatch.setattr(quickstart, "CHAIN", (("distill", good), ("train", bad)))
    with pytest.raises(RuntimeError, match="before its run"):
        quickstart.run_quickstart(config)
    tracker = Tracker.open(config)
    assert MlflowClient(tracker.uri).get_run(tracker.parent()).info.status == "FAILED"
