"""Training for real: Ray Train, two DeepSpeed workers, a tiny base, distilled rows written through the contracts."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads.checkpoint import load_checkpoint
from pipelines.config import RunConfig, load_config, to_yaml
from pipelines.distill.stage import distilled
from pipelines.runtime.artifacts import RunPaths, StageResult, stage_folder
from pipelines.tracking import Tracker
from pipelines.train import stage as train_stage
from pipelines.train.loop import restore
from pipelines.train.stage import run_train
from tests.conftest import ROOT
from tests.pipelines.synthetic import write_distilled, write_shard

STEPS, EVERY = 60, 10


def make_config(base_dir: Path, storage: Path, name: str, kind: str = "hydra", **changes: Any) -> RunConfig:
    return load_config(None, {
        "storage": str(storage), "name": name, "base.model": str(base_dir), "base.dtype": "fp32",
        "train.drafters": {kind: {"kind": kind, "draft_vocab_size": 200}}, "train.rows_per_step": 8,
        "train.max_steps": STEPS, "train.epochs": 50, "train.validate_every": EVERY, "train.lr": 3e-3,
        "train.validation_rows": 16} | changes)


EXACT = {"train.drafters": {"hydra++": {"kind": "hydra++", "draft_vocab_size": 200, "dropout": 0.1}}, "train.accumulate": 2,
         "train.ema": 0.9, "train.schedule": "wsd", "train.betas": [0.9, 0.95]}
"""All that a resumed run must bring back: dropout's draws, pieces of a step, averaged weights, a place in the schedule."""


def curve_of(config: RunConfig, name: str) -> list[dict[str, Any]]:
    path = RunPaths.of(config).stage("train", name) / "curve.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "time"} for record in curve]


def children_of(process: int) -> dict[int, str]:
    """Every living descendant of a process, with its command line."""
    parents, commands = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
    found: dict[int, str] = {}
    fresh = {process}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found.keys()
        found |= {child: commands.get(child, "") for child in fresh}
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 240) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("nothing happened in time")


def saved_steps(config: RunConfig, name: str) -> int:
    """Steps of the newest checkpoint that Ray has taken in."""
    state = RunPaths.of(config).stage("train", name) / "state"
    found = [0]
    for path in state.glob("*/checkpoint_manager_snapshot.json"):
        with contextlib.suppress(OSError, ValueError):  # it may be half-written at this very moment
            for entry in json.loads(path.read_text())["checkpoint_results"]:
                found.append(entry["metrics"]["step"])
    return max(found)


def weights_of(config: RunConfig, name: str) -> dict[str, bytes]:
    """Best and last heads, as bytes."""
    folder = RunPaths.of(config).stage("train", name)
    return {kind: (folder / kind / "model.safetensors").read_bytes() for kind in ("heads", "last")}


@pytest.fixture(scope="module")
def exact(tiny_base: Base, tiny_base_dir: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished, undisturbed run of everything that a killed one is to repeat to the last bit."""
    config = make_config(tiny_base_dir, tmp_path_factory.mktemp("exact") / "storage", "exact", **EXACT)
    write_distilled(config, tiny_base)
    run_train(config)
    return config


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Base, tiny_base_dir: Path, local_ray: None,
                tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of Hydra heads: ZeRO-1, fp32."""
    config = make_config(tiny_base_dir, tmp_path_factory.mktemp("train") / "storage", "undisturbed")
    write_distilled(config, tiny_base)
    run_train(config)
    return config


@pytest.mark.slow
def test_training_learns_and_leaves_a_loadable_checkpoint(undisturbed: RunConfig, tiny_base: Base) -> None:
    result = run_train(undisturbed)
    assert result.skipped and result.stage == "train"
    figures = result.figures["hydra"]
    curve = curve_of(undisturbed, "hydra")
    assert [record["step"] for record in curve] == list(range(STEPS)) and figures["steps"] == STEPS
    assert sum(r["loss"] for r in curve[-5:]) < 0.8 * sum(r["loss"] for r in curve[:5])
    assert figures["tokens_per_step"] > 1.1 and 0.9 < figures["coverage"] <= 1 and len(figures["top1"]) == 4
    loaded = load_checkpoint(Path(result.outputs["hydra"]), tiny_base.vocabulary)
    assert loaded.drafter.config.kind == "hydra"
    provenance = json.loads((Path(result.outputs["hydra"]) / "provenance.json").read_text())
    assert provenance["training"]["step"] == figures["best_step"] and provenance["data_digest"]
    state = RunPaths.of(undisturbed).stage("train", "hydra")
    assert not (state / "state").exists() and not list(state.glob("log_partitions*"))


def changed(config: RunConfig, **values: Any) -> RunConfig:
    return load_config(None, config.model_dump(mode="json", by_alias=True) | {
        name.replace("__", "."): value for name, value in values.items()})


@pytest.mark.slow
def test_the_same_base_elsewhere_and_the_device_of_auto_are_no_other_run(undisturbed: RunConfig, tiny_base_dir: Path,
                                                                        tmp_path: Path) -> None:
    """Nor are they where an earlier version has recorded them in the fingerprint."""
    shutil.copytree(tiny_base_dir, tmp_path / "mount" / tiny_base_dir.name)
    moved = changed(undisturbed, base__model=str(tmp_path / "mount" / tiny_base_dir.name), base__device="cpu")
    assert run_train(moved).skipped
    manifest = RunPaths.of(undisturbed).stage("train", "hydra") / "manifest.json"
    now = manifest.read_text(encoding="utf-8")
    settings = train_stage._settings(undisturbed, "hydra")
    settings = {**settings, "base": undisturbed.base.model_dump(mode="json"), "train": settings["train"] | {"workers": 2}}
    earlier = train_stage._digest_of(settings, "hydra", distilled(undisturbed)[1], None)
    assert earlier != json.loads(now)["fingerprint"]
    try:
        manifest.write_text(json.dumps(json.loads(now) | {"fingerprint": earlier}), encoding="utf-8")
        assert run_train(moved).skipped
    finally:
        manifest.write_text(now, encoding="utf-8")


@pytest.mark.slow
def test_the_settings_that_differ_are_named(undisturbed: RunConfig) -> None:
    other = changed(undisturbed, train__lr=0.002, train__drafters={"hydra": {"kind": "hydra", "draft_vocab_size": 200,
                                                                             "dropout": 0.1}})
    with pytest.raises(InputError, match=r"\(train\.lr 0\.003 -> 0\.002, train\.drafters\.hydra\.dropout 0 -> 0\.1\)"):
        run_train(other)


@pytest.mark.slow
def test_the_bases_log_partitions_are_computed_once_for_all_drafters(exact: RunConfig) -> None:
    folder = RunPaths.of(exact).cache / "log_partitions"
    made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(made) == 2 and all(path.suffix == ".npy" for path in made)  # of the training rows, and of those held out
    other = {"again": {"kind": "hydra++", "draft_vocab_size": 100}}
    same = exact.model_dump(mode="json", by_alias=True)
    run_train(load_config(None, same | {"train.drafters": other, "train.max_steps": EVERY}))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == made


@pytest.mark.slow
def test_metrics_are_in_the_tracker(undisturbed: RunConfig) -> None:
    stage = json.loads((RunPaths.of(undisturbed).stage("train", "hydra") / "manifest.json").read_text())["result"]
    tracker = Tracker.open(undisturbed)
    client = MlflowClient(tracker.uri)
    run = client.get_run(stage["run_id"])
    assert run.data.tags["mlflow.parentRunId"] == tracker.parent() and run.info.status == "FINISHED"
    losses = client.get_metric_history(stage["run_id"], "train.loss")
    assert sorted(metric.step for metric in losses) == list(range(STEPS))
    held_out = client.get_metric_history(stage["run_id"], "held_out.tokens_per_step")
    assert sorted(metric.step for metric in held_out) == list(range(EVERY, STEPS + 1, EVERY))
    assert max(m.value for m in held_out) == pytest.approx(run.data.metrics["best.tokens_per_step"])
    for head in range(4):
        assert client.get_metric_history(stage["run_id"], f"held_out.head{head}_top5")


@pytest.mark.slow
def test_a_killed_worker_costs_nothing_but_time(exact: RunConfig, tiny_base: Base, tiny_base_dir: Path, local_ray: None,
                                                moment: random.Random) -> None:
    """SIGKILL at a random step: every step stands once in the curve, and it and all weights are equal to the last bit."""
    config = make_config(tiny_base_dir, Path(exact.storage), "killed-worker", **EXACT)
    write_distilled(config, tiny_base)
    killed: list[float] = []
    least, later = moment.randrange(EVERY, STEPS - 3 * EVERY), moment.uniform(0, 0.25)

    def kill() -> None:
        wait_for(lambda: saved_steps(config, "hydra++") >= least)
        time.sleep(later)
        for worker in [pid for pid, command in children_of(os.getpid()).items() if "RayTrainWorker" in command][:1]:
            now = time.time()
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
                killed.append(now)

    killer = threading.Thread(target=kill)
    killer.start()
    run_train(config)
    killer.join()
    curve = curve_of(config, "hydra++")
    assert [record["step"] for record in curve] == list(range(STEPS))
    assert without_time(curve) == without_time(curve_of(exact, "hydra++"))
    assert weights_of(config, "hydra++") == weights_of(exact, "hydra++")
    if not killed:
        pytest.skip("the training was over before its worker could be killed")
    before = [record["step"] for record in curve if record["time"] < killed[0]]
    assert EVERY <= len(before) <= STEPS and before == list(range(len(before))) and len(before) % EVERY == 0


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(exact: RunConfig, tiny_base: Base, tiny_base_dir: Path, tmp_path: Path,
                                           worker_env: dict[str, str], local_ray: None) -> None:
    """The whole job dies with its local Ray; the next one, in another Ray, ends with the same curve and weights."""
    config = make_config(tiny_base_dir, tmp_path / "storage", "killed-job", **EXACT)
    write_distilled(config, tiny_base)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    script = ("import sys; from pipelines.config.run import load_config; from pipelines.train import run_train; "
              "run_train(load_config(sys.argv[1]))")
    job = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "config.yaml")],
        cwd=ROOT, env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | worker_env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: saved_steps(config, "hydra++") >= EVERY or job.poll() is not None)
        assert job.poll() is None, "the job ended before it could be killed"
    finally:
        for process in (job.pid, *children_of(job.pid)):
            with contextlib.suppress(ProcessLookupError):  # it ended by itself in between
                os.kill(process, signal.SIGKILL)
        job.wait()
    died = time.time()
    result = run_train(config)
    curve = curve_of(config, "hydra++")
    assert [record["step"] for record in curve] == list(range(STEPS)) and not result.skipped
    before = [record["step"] for record in curve if record["time"] < died]
    assert EVERY <= len(before) < STEPS and len(before) % EVERY == 0 and before == list(range(len(before)))
    assert without_time(curve) == without_time(curve_of(exact, "hydra++"))
    assert weights_of(config, "hydra++") == weights_of(exact, "hydra++")


def test_steps_that_a_kill_kept_from_the_tracker_are_logged_on_resuming(storage: Path, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the last checkpoint and its logging: no later step would bring those up."""
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    tracker = Tracker.open(load_config(None, {"storage": str(storage)}))
    run = tracker.start("train")
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "heads").mkdir(parents=True)
    (checkpoint / "curve.jsonl").write_text("".join(json.dumps({"step": n, "time": 0.0, "loss": 2.0 - n}) + "\n" for n in (0, 1)))
    figures = {"step": 2, "loss": 1.0, "tokens_per_step": 1.5}
    (checkpoint / "heads" / "provenance.json").write_text(json.dumps({"training": figures}))
    context: Any = SimpleNamespace(
        engine=SimpleNamespace(load_checkpoint=lambda folder, tag: (folder, {"next_step": 2})), first=True, curve=[], next_step=0,
        average=None, lanes=None,
        settings=SimpleNamespace(run_id=run.run_id, tracking_uri=tracker.uri, folder=str(tmp_path)))
    for _ in range(2):  # what is logged already is not logged twice
        restore(context, SimpleNamespace(as_directory=lambda: contextlib.nullcontext(str(checkpoint))))
    client = MlflowClient(tracker.uri)
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "train.loss")] == [(0, 2.0), (1, 1.0)]
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "held_out.tokens_per_step")] == [(2, 1.5)]
    assert context.next_step == 2 and len(context.curve) == 2
    assert context.lanes == 1  # an earlier version has written no number of lanes, and had one
    context.engine.load_checkpoint = lambda folder, tag: (folder, {"next_step": 2, "lanes": 8})
    restore(context, SimpleNamespace(as_directory=lambda: contextlib.nullcontext(str(checkpoint))))
    assert context.lanes == 8


@pytest.mark.slow
def test_held_out_prompts_are_decoded_beside_it(undisturbed: RunConfig, tiny_base: Base, tiny_base_dir: Path, tmp_path: Path,
                                                local_ray: None) -> None:
    """The tracker has what an engine made of the heads at those steps, and they are the heads of a run without it."""
    config = make_config(tiny_base_dir, tmp_path / "storage", "beside", **{"train.decode_every": 20, "train.decode_prompts": 4,
                                                                           "train.decode_tokens": 12})
    write_distilled(config, tiny_base)
    run_train(config)
    stage = json.loads((RunPaths.of(config).stage("train", "hydra") / "manifest.json").read_text())["result"]
    decoded = MlflowClient(Tracker.open(config).uri).get_metric_history(stage["run_id"], "decoded.tokens_per_step")
    assert [metric.step for metric in decoded] == [20, 40, 60] and all(1 <= metric.value <= 5 for metric in decoded)
    assert weights_of(config, "hydra") == weights_of(undisturbed, "hydra")
    assert not list(RunPaths.of(config).stage("train", "hydra").glob("decode-*"))


def test_the_data_are_known_by_their_rows_not_by_their_files(tiny_base: Base, tiny_base_dir: Path, storage: Path) -> None:
    config = make_config(tiny_base_dir, storage, "rows")
    folder = write_distilled(config, tiny_base, train=8, held_out=4)
    before = distilled(config)
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    for path in folder.glob("*.parquet"):
        path.unlink()
    write_shard(folder / "part-other.parquet", rows[::-1])
    assert distilled(config) == before
    write_shard(folder / "part-other.parquet", rows[1:])
    assert distilled(config) != before


@pytest.mark.slow
def test_a_diverging_loss_stops_with_one_line(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path,
                                              local_ray: None) -> None:
    config = make_config(tiny_base_dir, tmp_path / "storage", "diverged", "medusa",
                         **{"train.lr": 3e38, "train.warmup_steps": 0, "train.max_steps": 5})
    write_distilled(config, tiny_base, train=16, held_out=4)
    with pytest.raises(StoppedError, match=r"train\.drafters\.medusa: the loss is .* at step \d .*: no checkpoint was made"):
        run_train(config)
    assert not (RunPaths.of(config).stage("train", "medusa") / "heads").exists()


@pytest.mark.slow
def test_an_exploding_loss_keeps_the_last_good_checkpoint(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path,
                                                          local_ray: None) -> None:
    """A rate far too high, and a checkpoint at every step: the newest one loads and is named."""
    config = make_config(tiny_base_dir, tmp_path / "storage", "exploded", "medusa",
                         **{"train.lr": 1e3, "train.warmup_steps": 0, "train.validate_every": 1, "train.max_steps": 8})
    write_distilled(config, tiny_base, train=16, held_out=4)
    with pytest.raises(StoppedError, match=r"the loss is .* at step \d+ .*: the last good checkpoint, after") as raised:
        run_train(config)
    said = re.search(r"after (\d+) steps, is (\S+);", str(raised.value))
    assert said and "\n" not in str(raised.value)
    kept = Path(said[2])
    assert json.loads((kept / "provenance.json").read_text())["training"]["step"] == int(said[1]) > 0
    weights = load_checkpoint(kept, tiny_base.vocabulary).drafter.parameters()
    assert all(bool(tensor.isfinite().all()) for tensor in weights)


def test_what_another_run_finished_meanwhile_is_not_trained_again(tiny_base: Base, tiny_base_dir: Path, storage: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """The question is asked again under the lock, which that run held until now."""
    config = make_config(tiny_base_dir, storage, "both")
    features = write_distilled(config, tiny_base, train=8, held_out=4)
    digest, folder = distilled(config)[1], RunPaths.of(config).stage("train", "hydra")
    with stage_folder(config, "train", folder, train_stage._fingerprint(config, "hydra", digest)) as stage:
        (folder / "heads").write_text("theirs", encoding="utf-8")
        stage.finish(StageResult("train", "theirs", {"heads": str(folder / "heads")}, {}), [folder / "heads"])
    monkeypatch.setattr(train_stage, "build_trainer", None)
    vocabulary: Any = None
    tracker: Any = None
    found = train_stage._train_one(config, "hydra", (features, features), digest, vocabulary, tracker)
    assert found.skipped and found.run_id == "theirs" and (folder / "heads").exists()


def test_features_of_another_base_are_refused(tiny_base: Base, tiny_base_dir: Path, storage: Path) -> None:
    config = make_config(tiny_base_dir, storage, "other", **{"base.dtype": "bf16"})
    write_distilled(config, tiny_base, train=8, held_out=4)  # made by the fp32 base
    with pytest.raises(InputError, match=r"rows were made by base .*:fp32, not .*:bf16"):
        run_train(config)


def test_training_before_distilling_is_refused(tiny_base_dir: Path, storage: Path) -> None:
    with pytest.raises(InputError, match="no finished `distill` here"):
        run_train(make_config(tiny_base_dir, storage, "nothing"))


def test_a_name_that_cannot_be_a_folder_is_refused(tiny_base_dir: Path, storage: Path) -> None:
    config = make_config(tiny_base_dir, storage, "names", **{"train.drafters": {"a/b": {"kind": "medusa"}}})
    with pytest.raises(InputError, match="'a/b' cannot name a folder"):
        run_train(config)


def test_a_cluster_that_is_too_small_is_told_at_once(tiny_base: Base, tiny_base_dir: Path, storage: Path,
                                                     local_ray: None) -> None:
    config = make_config(tiny_base_dir, storage, "small", **{"train.workers": {"count": 2, "cpus": 64}})
    write_distilled(config, tiny_base, train=8, held_out=4)
    with pytest.raises(InputError, match=r"2 x 64\.0 CPU are asked for, the cluster has 2"):
        run_train(config)
