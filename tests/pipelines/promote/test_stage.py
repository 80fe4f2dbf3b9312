"""The champion is what was measured, and is registered where it is asked for. Real MLflow on SQLite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import Base
from hydra_core.decoding import read_configuration
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.proposers import NgramDrafter
from hydra_core.tree import DraftTree, TreeSet
from pipelines.bench.inputs import bench_fingerprint, find_heads
from pipelines.config import RunConfig, load_config
from pipelines.promote.stage import run_promote
from pipelines.runtime.artifacts import RunPaths, StageResult, stage_folder
from pipelines.runtime.files import write_text
from pipelines.serve.model_identity import configuration_digest
from pipelines.serve.stage import find_args, resolve_args
from pipelines.tracking import Tracker, register, resolve
from tests.tiny import save_tiny
from tests.trained import random_heads

pytestmark = pytest.mark.slow
FIGURES = {"tokens_per_step": 2.0, "fp32": {"answers": 8, "identical": 8, "near_tie": 0, "different": 0}}


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config_for(storage: Path, base: Path, **changes: object) -> RunConfig:
    values = {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32"}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def benched(config: RunConfig, **speeds: float) -> Path:
    """A finished bench whose fastest contender is the one named so; its folder."""
    heads = find_heads(config)
    folder = RunPaths.of(config).stage("bench")
    methods = {name: FIGURES | {"speed_vs_plain": speed} for name, speed in {"plain": 1.0, **speeds}.items()}
    plan = {"base": config.base.model_dump(mode="json"), "ngram": [5, 4, 8], "heads": heads}
    with stage_folder(config, "bench", folder, bench_fingerprint(config, heads)) as stage:
        write_text(folder / "report.json", json.dumps({"methods": methods, "plan": plan}))
        stage.finish(StageResult("bench", None, {}, {}), [folder / "report.json"])
    return folder


def champion(config: RunConfig, tmp_path: Path) -> tuple[int, str]:
    """Version and drafter that the alias stands for."""
    version, folder = resolve(config, "models:/hydra-heads@champion", tmp_path / "download")
    return version, read_configuration(folder).name


def test_registered_again_where_the_alias_does_not_stand_for_it(tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                                                tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    config = config_for(storage, tiny_base_dir)
    benched(config, ngram=1.5)
    first = run_promote(config)
    assert (first.figures["champion"], first.figures["version"]) == ("ngram", 1)
    promoted = read_configuration(Path(first.outputs["configuration"]))
    assert promoted.ngram == NgramDrafter(max_match=5, min_match=4, length=8)  # as measured, not the defaults
    client = MlflowClient(Tracker.open(config).uri)
    params = client.get_run(first.run_id).data.params
    assert params["base.dtype"] == "fp32" and params["promote.alias"] == "champion" and "batch.seed" not in params
    again = run_promote(config)
    assert again.skipped and again.figures == first.figures

    elsewhere = config_for(storage, tiny_base_dir, tracking__uri=f"sqlite:///{tmp_path}/elsewhere.db")
    moved = run_promote(elsewhere)
    assert not moved.skipped and champion(elsewhere, tmp_path)[1] == "ngram"
    assert run_promote(config).skipped and run_promote(elsewhere).skipped

    client.delete_registered_model_alias("hydra-heads", "champion")
    with pytest.raises(InputError, match="run `hydra-heads promote`"):
        find_args(config)
    assert run_promote(config).figures["version"] == 2 and champion(config, tmp_path) == (2, "ngram")

    plain = tmp_path / "plain"
    shutil.copytree(storage / "runs" / "default" / "promote" / "configuration", plain)
    write_text(plain / "configuration.json", (plain / "configuration.json").read_text().replace('"ngram"', '"plain"', 1))
    with Tracker.open(config).start("promote") as run:  # somebody else's champion
        run.log_artifact(plain, "configuration")
        register(config, "hydra-heads", run, "configuration", "champion", {})
    stays = run_promote(config)  # measured before that version was champion
    assert stays.skipped and (stays.figures["version"], stays.figures["promoted"]) == (3, False)
    assert "before models:/hydra-heads/3 became champion" in stays.figures["why"] and champion(config, tmp_path)[0] == 3
    forced = run_promote(config_for(storage, tiny_base_dir, promote__force=True))
    assert forced.figures["version"] == 4 and champion(config, tmp_path) == (4, "ngram")

    shutil.rmtree(find_args(config).configuration or "")  # what the version stood for is gone
    assert run_promote(config).figures["version"] == 5
    assert Path(resolve_args(config).configuration or "").is_dir()
    found = configuration_digest(find_args(config).configuration)
    assert found == configuration_digest(storage / "runs" / "default" / "promote" / "configuration")


@pytest.mark.parametrize("winner", ["plain", "ngram"])
def test_another_base_is_refused_whatever_won(tiny_base_dir: Path, storage: Path, tmp_path: Path, winner: str) -> None:
    config = config_for(storage, tiny_base_dir)
    benched(config, ngram=1.5 if winner == "ngram" else 0.5)
    other = save_tiny(tmp_path / "other", seed=1)
    for wrong in (config_for(storage, other), config_for(storage, tiny_base_dir, base__dtype="bf16")):
        with pytest.raises(InputError, match=r"bench: measured another base than base\.model=") as caught:
            run_promote(wrong)
        assert "\n" not in str(caught.value)
    assert not (storage / "runs" / "default" / "promote").exists() and not (storage / "mlflow").exists()
    # what was asked of bench alone, and where things run, does not matter
    assert run_promote(config_for(storage, tiny_base_dir, bench__limit=3, base__device="cpu")).figures["champion"] == winner
    with pytest.raises(InputError, match="measured another base"):  # finished or not
        run_promote(config_for(storage, other))


def test_other_heads_than_were_measured_are_refused(tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                                    tmp_path: Path) -> None:
    def save(seed: int) -> Path:
        shutil.rmtree(tmp_path / "heads", ignore_errors=True)
        save_checkpoint(tmp_path / "heads", random_heads(tiny_base, "hydra", seed=seed), tiny_base.identity,
                        TreeSet({1: DraftTree(((0,), (0, 0)))}), {})
        return tmp_path / "heads"

    config = config_for(storage, tiny_base_dir, bench__heads=str(save(1)))
    benched(config, hydra=1.5)
    save(2)
    with pytest.raises(InputError, match="other heads"):
        run_promote(config)
    save(1)
    promoted = run_promote(config)
    assert promoted.figures["champion"] == "hydra"
    assert resolve_args(config).configuration is not None


@pytest.mark.parametrize(("winner", "drafter", "heads"), [
    ("plain", "plain", None), ("ngram", "ngram", None), ("one", "heads", "one"), ("two", "heads", "two"),
    ("combined", "combined", "two")])
def test_the_winner_is_registered_with_its_own_heads_and_settings(tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                                                  winner: str,
                                                                  drafter: str, heads: str | None) -> None:
    """Of several heads `combined` drafts with the last ones of the run; text lookup has the settings that were measured."""
    config = config_for(storage, tiny_base_dir, train__drafters={name: {"kind": "hydra"} for name in ("one", "two")})
    digests = {}
    for seed, name in enumerate(config.train.drafters):
        folder = RunPaths.of(config).stage("tree", name)
        with stage_folder(config, "tree", folder, name) as stage:
            save_checkpoint(folder / "heads", random_heads(tiny_base, "hydra", seed=seed), tiny_base.identity,
                            TreeSet({1: DraftTree(((0,), (0, 0)))}), {})
            stage.finish(StageResult("tree", None, {}, {}), list((folder / "heads").iterdir()))
        digests[name] = (folder / "heads" / "model.safetensors").read_bytes()
    benched(config, **{name: 3.0 if name == winner else 0.5 for name in ("ngram", "one", "two", "combined")})
    promoted = run_promote(config)
    assert (promoted.figures["champion"], promoted.figures["speed_vs_plain"]) == (winner, 1.0 if winner == "plain" else 3.0)
    _, folder = resolve(config, "models:/hydra-heads@champion", storage / "download")
    found = read_configuration(folder)
    assert (found.name, found.drafter, found.base, found.ngram) == (winner, drafter, tiny_base.identity, NgramDrafter(5, 4, 8))
    assert (folder / "heads").exists() == (heads is not None)
    assert heads is None or (folder / "heads" / "model.safetensors").read_bytes() == digests[heads]
    assert digests["one"] != digests["two"]


def test_mistakes_leave_no_claim(tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir, tracking__uri="http://127.0.0.1:9")
    with pytest.raises(InputError, match="no finished `bench` here"):
        run_promote(config)
    benched(config, ngram=1.5)
    with pytest.raises(StoppedError, match=r"tracking\.uri=http://127\.0\.0\.1:9"):
        run_promote(config)
    assert not (storage / "runs" / "default" / "promote").exists()


@pytest.mark.parametrize("shown", [True, False])
def test_a_base_that_does_not_fit_in_fp32_is_judged_in_its_own_format(tiny_base_dir: Path, storage: Path, shown: bool) -> None:
    """A contender whose answers were not checked there does not win, whatever was shown in fp32."""
    config = config_for(storage, tiny_base_dir, base__dtype="bf16")
    folder = benched(config, ngram=1.5)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report["proof"] = {"format": "bf16", "why": "it does not fit in fp32"}
    if shown:
        report["methods"]["ngram"] |= {"fp32": None, "naive": {"bf16": FIGURES["fp32"]}}
    write_text(folder / "report.json", json.dumps(report))
    promoted = run_promote(config)
    assert promoted.figures["champion"] == ("ngram" if shown else "plain")
    assert read_configuration(Path(promoted.outputs["configuration"])).base.weight_format == "bf16"


def test_a_report_without_plain(tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir)
    folder = benched(config)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    write_text(folder / "report.json", json.dumps(report | {"methods": {}}))
    with pytest.raises(InputError, match="no plain decoding"):
        run_promote(config)
    assert not (storage / "runs" / "default" / "promote").exists()
