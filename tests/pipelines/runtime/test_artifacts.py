"""When a stage is done, when it is not, and whose folder it is."""

from __future__ import annotations

import json
import os
import re
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from hydra_core.errors import InputError
from pipelines.config import RunConfig, load_config
from pipelines.runtime.artifacts import (
    StageResult,
    damaged,
    fingerprint,
    finished,
    read_manifest,
    recorded_settings,
    require_manifest,
    stage_folder,
    write_text,
)

WANTED = fingerprint("distill", {"a": 1}, {"base": "x"})


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(None, {"storage": str(tmp_path / "storage")})


def work(config: RunConfig, folder: Path, wanted: str = WANTED) -> StageResult:
    with stage_folder(config, "distill", folder, wanted) as stage:
        write_text(folder / "deep" / "rows", "rows")
        return stage.finish(StageResult("distill", "run", {"rows": str(folder / "deep" / "rows")}, {"n": 1}),
                            [folder / "deep" / "rows"])


def test_done_means_same_work_and_whole_files(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert finished(folder, WANTED) is None
    result = work(config, folder)
    again = finished(folder, WANTED)
    assert again is not None and again.skipped and again.figures == result.figures and again.outputs == result.outputs
    assert finished(folder, fingerprint("distill", {"a": 2}, {"base": "x"})) is None
    assert finished(folder, fingerprint("distill", {"a": 1}, {"base": "y"})) is None
    (folder / "deep" / "rows").write_text("rowz", encoding="utf-8")  # same size: only the digest tells
    assert finished(folder, WANTED) is None
    (folder / "deep" / "rows").unlink()
    assert finished(folder, WANTED) is None
    work(config, folder)
    assert finished(folder, WANTED) is not None
    assert load_config(str(folder / "config.yaml"), {}) == config


def test_not_done_without_a_manifest(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(RuntimeError), stage_folder(config, "distill", folder, WANTED):
        raise RuntimeError("killed")
    assert finished(folder, WANTED) is None
    with pytest.raises(InputError, match=r"no finished `distill` here: run `hydra-heads distill`"):
        require_manifest(folder, "distill")
    work(config, folder)  # the claim is our own: go on
    assert require_manifest(folder, "distill")["fingerprint"] == WANTED


def test_a_folder_of_another_run_is_never_touched(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    work(config, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="another run"):
        work(config, folder, fingerprint("distill", {"a": 2}, {}))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="not empty"):
        work(config, foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_a_mistake_leaves_nothing_that_refuses_the_corrected_command(config: RunConfig) -> None:
    root = Path(config.storage)
    folder = root / "runs" / "default" / "distill"

    def mistaken(write: bool, error: BaseException | None = None) -> None:
        with pytest.raises((InputError, KeyboardInterrupt)), stage_folder(config, "distill", folder, "0" * 64):
            (folder / "prompts").mkdir(exist_ok=True)
            if write:
                write_text(folder / "prompts" / "rows", "rows")
            raise error or InputError("row 3")

    mistaken(write=False)
    assert not (root / "runs").exists()
    mistaken(write=False, error=KeyboardInterrupt())
    assert not (root / "runs").exists()
    work(config, folder)  # other settings: not refused
    neighbour = root / "runs" / "default" / "train"
    folder = root / "runs" / "default" / "bench"
    neighbour.mkdir()
    mistaken(write=False)
    assert not folder.exists() and neighbour.exists()
    mistaken(write=True)  # rows stand: they are this run's, and it may go on
    with pytest.raises(InputError, match="another run"):
        work(config, folder)
    mistaken(write=False)
    assert (folder / "prompts" / "rows").exists()


def test_changed_outputs_go_and_the_others_stay(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with stage_folder(config, "distill", folder, WANTED) as stage:
        for name in ("a", "b"):
            write_text(folder / name, name)
        stage.finish(StageResult("distill", None, {}, {}), [folder / "a", folder / "b"])
    assert damaged(folder) == []
    (folder / "b").write_text("c", encoding="utf-8")
    assert damaged(folder) == [folder / "b"] and finished(folder, WANTED) is None
    with stage_folder(config, "distill", folder, WANTED):
        assert sorted(path.name for path in folder.iterdir()) == ["a", "claim.json", "config.yaml", "provenance.json"]


def test_figures_are_names_of_the_line(config: RunConfig) -> None:
    line = json.loads(StageResult("bench", "r", {"report": "/x"}, {"methods": {"plain": {"rows": 3}}, "stage": "mine"}).to_json())
    assert line == {"stage": "bench", "run_id": "r", "outputs": {"report": "/x"}, "skipped": False,
                    "methods": {"plain": {"rows": 3}}}


def test_saved_settings_hold_no_credentials(config: RunConfig, tmp_path: Path) -> None:
    secret = load_config(None, {"storage": config.storage, "tracking.uri": "postgresql://me:hunter2@db/x"})
    work(secret, tmp_path / "out")
    assert not any("hunter2" in path.read_text(encoding="utf-8") for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_broken_manifests_are_told(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    work(config, folder)
    manifest = folder / "manifest.json"
    values = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not a readable manifest"):
        read_manifest(folder)
    manifest.write_text(json.dumps(values | {"schema_version": 99}), encoding="utf-8")
    with pytest.raises(InputError, match="schema_version 99"):
        read_manifest(folder)


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


def test_fingerprints_hold_settings_by_their_earlier_names() -> None:
    """So that what an earlier version finished counts as done."""
    serve = recorded_settings(load_config(None, {"serve.max_batch_size": 5}).serve, mode="json", exclude={"update"})
    assert serve["max_batch"] == 5 and not {"max_batch_size", "update"} & serve.keys()


def test_two_runs_of_a_stage_at_once(config: RunConfig, tmp_path: Path) -> None:
    """The second one is told, touches nothing, and the first one ends as if it were alone."""
    folder, told = tmp_path / "out", []

    def second() -> None:
        try:
            work(config, folder)
        except InputError as error:
            told.append(str(error))

    with stage_folder(config, "distill", folder, WANTED) as stage:
        write_text(folder / "rows", "first")
        before = sorted(folder.rglob("*"))
        other = threading.Thread(target=second)
        other.start()
        other.join()
        assert sorted(folder.rglob("*")) == before and len(told) == 1
        assert re.fullmatch(rf"{folder}: another run writes to it \(process {os.getpid()} on .*\): wait for it or stop it",
                            told[0])
        stage.finish(StageResult("distill", None, {}, {}), [folder / "rows"])
    assert finished(folder, WANTED) is not None and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("finish", [True, False])
def test_the_settings_that_differ_are_named_with_both_values(config: RunConfig, tmp_path: Path, finish: bool) -> None:
    folder = tmp_path / "out"

    def run(lr: float, betas: tuple[float, ...] = (0.9, 0.95)) -> None:
        settings = {"train": {"lr": lr, "betas": betas, "schedule": "wsd", "max_steps": None}}
        with stage_folder(config, "train", folder, fingerprint("train", settings, {}), settings=settings) as stage:
            write_text(folder / "rows", "rows")
            if not finish:
                raise RuntimeError
            stage.finish(StageResult("train", None, {}, {}), [folder / "rows"])

    with nullcontext() if finish else pytest.raises(RuntimeError):
        run(1e-3)
    with pytest.raises(InputError, match=r"the `train` output of another run \(train\.lr 0\.001 -> 0\.002\): choose"):
        run(2e-3)
    with pytest.raises(InputError, match=r"\(train\.lr 0\.001 -> 0\.002, train\.betas \[0\.9,0\.95\] -> \[0\.9,0\.99\]\)"):
        run(2e-3, (0.9, 0.99))
    with pytest.raises(InputError, match="the settings are the same: its inputs were made again"), \
            stage_folder(config, "train", folder, "other inputs", settings={"train": {"lr": 1e-3}}):
        pass


def test_the_settings_of_an_earlier_version_are_read_from_its_config(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    work(config, folder)
    write_text(folder / "claim.json", json.dumps({"fingerprint": WANTED, "stage": "distill"}))
    with pytest.raises(InputError, match=r"\(distill\.seed 0 -> 3\)"), \
            stage_folder(config, "distill", folder, "x", settings={"distill": {"seed": 3, "temperatures": (0.0, 1.0)}}):
        pass


def test_what_an_earlier_version_finished_counts_under_its_own_fingerprint(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    work(config, folder)
    now = fingerprint("distill", {"a": "as it is written now"}, {})
    assert finished(folder, now) is None and finished(folder, now, {WANTED}) is not None
    with stage_folder(config, "distill", folder, now, earlier={WANTED}) as stage:
        assert stage.fingerprint == WANTED
        stage.finish(StageResult("distill", None, {}, {}), [folder / "deep" / "rows"])
    assert require_manifest(folder, "distill")["fingerprint"] == WANTED


def test_leftovers_of_killed_writers_go(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "train" / "hydra"
    (folder / ".heads.0a1b2c3d.part").mkdir(parents=True)
    (folder / ".heads.0a1b2c3d.part" / "model").write_text("half", encoding="utf-8")
    (folder / ".claim.json.00000000.part").write_text("", encoding="utf-8")
    others = [folder.parent / ".hydra.seed0.0a1b2c3d.part", folder.parent / ".hydra.notes"]
    for path in others:
        path.write_text("of others", encoding="utf-8")
    (folder.parent / ".hydra.0a1b2c3d.old").mkdir()
    work(config, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["claim.json", "config.yaml", "deep", "manifest.json",
                                                              "provenance.json"]
    assert sorted(path for path in folder.parent.iterdir() if path != folder) == sorted(others)
