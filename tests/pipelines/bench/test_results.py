"""A run holds several benches beside each other; those of an earlier version are still found."""

from __future__ import annotations

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_core.base import Base, resolve_base
from hydra_core.bundled import folders
from hydra_core.decoding import read_configuration
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from pipelines.bench import results
from pipelines.bench.inputs import bench_fingerprint, find_heads, find_methods
from pipelines.bench.plan import read_rows
from pipelines.bench.results import bench_label, claimed_result, finished_benches, fitting_bench, result_folder
from pipelines.bench.stage import run_bench
from pipelines.config import RunConfig, load_config
from pipelines.promote.stage import run_promote
from pipelines.runtime.artifacts import RunPaths, StageResult, file_digest, fingerprint, stage_folder
from pipelines.runtime.files import write_text
from tests.trained import random_heads

FIGURES = {"tokens_per_step": 2.0, "fp32": {"answers": 8, "identical": 8, "near_tie": 0, "different": 0}}


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config_for(storage: Path, base: Path, prompts: str = "questions", **changes: object) -> RunConfig:
    storage.mkdir(exist_ok=True)
    path = storage / f"{prompts}.jsonl"
    path.write_text(json.dumps({"prompt": prompts}) + "\n", encoding="utf-8")
    values = {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "bench.prompts": str(path)}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def finish(config: RunConfig, **speeds: float) -> Path:
    """A finished bench; its folder."""
    heads = find_heads(config)
    wanted = bench_fingerprint(config, heads)
    folder = result_folder(RunPaths.of(config).stage("bench"), wanted, bench_label(config))
    methods = {name: FIGURES | {"speed_vs_plain": speed} for name, speed in {"plain": 1.0, **speeds}.items()}
    plan = {"base": config.base.model_dump(mode="json"), "ngram": [3, 2, 8], "heads": heads}
    with stage_folder(config, "bench", folder, wanted) as stage:
        write_text(folder / "report.json", json.dumps({"methods": methods, "plan": plan}))
        stage.finish(StageResult("bench", None, {"report": str(folder / "report.json")}, {}), [folder / "report.json"])
    return folder


def test_a_second_bench_lies_beside_the_first(tiny_base_dir: Path, storage: Path) -> None:
    first, second = config_for(storage, tiny_base_dir), config_for(storage, tiny_base_dir, "spec bench/../x".replace("/", "-"))
    limited = config_for(storage, tiny_base_dir, bench__limit=1)
    root = RunPaths.of(first).stage("bench")
    assert finish(first) == root
    beside = finish(second)
    assert beside.parent == root and beside.name.startswith("spec-bench-..-x-")
    assert finish(limited).parent == root and len(finished_benches(first)) == 3
    for config, folder in ((first, root), (second, beside)):
        found = run_bench(config)
        assert found.skipped and found.outputs["report"] == str(folder / "report.json")
        assert fitting_bench(config)[0] == folder


def test_a_folder_that_is_no_result_is_left_alone(tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir)
    root = RunPaths.of(config).stage("bench")
    root.mkdir(parents=True)
    (root / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is not empty and not a `bench` output"):
        finish(config)
    (root / "notes.txt").unlink()
    write_text(root / "claim.json", "half a cla")  # nobody's work any more, and not free
    assert finish(config).parent == root


def test_two_first_benches_at_once_have_a_folder_each(tiny_base_dir: Path, storage: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have found the first folder free; one of them has claimed it then."""
    config = config_for(storage, tiny_base_dir)
    root, real, early = RunPaths.of(config).stage("bench"), results.result_folder, [RunPaths.of(config).stage("bench")]
    monkeypatch.setattr(results, "result_folder", lambda *asked: early.pop() if early else real(*asked))
    with ThreadPoolExecutor(1) as other, stage_folder(config, "bench", root, "a" * 64):
        def second() -> Path:
            with claimed_result(config, "bench", root, "b" * 64, "questions") as stage:
                write_text(stage.folder / "rows", "mine")
                return stage.folder

        assert other.submit(second).result() == root / "questions-bbbbbbbb" and not early
        write_text(root / "rows", "first")
    assert result_folder(root, "b" * 64, "questions") == root / "questions-bbbbbbbb"
    with ThreadPoolExecutor(1) as other, stage_folder(config, "bench", root, "a" * 64), \
            pytest.raises(InputError, match="another run writes to it"):  # the very same bench
        other.submit(lambda: claimed_result(config, "bench", root, "a" * 64, "questions").__enter__()).result()


def test_the_device_that_auto_chooses_is_no_other_bench(tiny_base_dir: Path, storage: Path) -> None:
    """Where there is no GPU; and what an earlier version recorded with `cpu` is found."""
    if torch.cuda.is_available():
        pytest.skip("auto is not the CPU here")
    auto, cpu = config_for(storage, tiny_base_dir), config_for(storage, tiny_base_dir, base__device="cpu")
    finish(auto)
    assert run_bench(cpu).skipped and fitting_bench(cpu)[0] == fitting_bench(auto)[0]
    limited = {"bench__limit": 1, "base__device": "cpu"}
    early = config_for(storage, tiny_base_dir, **limited)
    folder = result_folder(RunPaths.of(auto).stage("bench"), bench_fingerprint(early, {}, "cpu"), "questions")
    with stage_folder(early, "bench", folder, bench_fingerprint(early, {}, "cpu")) as stage:
        write_text(folder / "report.json", "{}")
        stage.finish(StageResult("bench", None, {"report": str(folder / "report.json")}, {}), [folder / "report.json"])
    assert run_bench(early).outputs["report"] == str(folder / "report.json") and fitting_bench(early)[0] == folder


def test_promote_takes_the_bench_of_its_settings(tiny_base_dir: Path, storage: Path) -> None:
    first, second = config_for(storage, tiny_base_dir), config_for(storage, tiny_base_dir, "others", bench__limit=3)
    finish(first, ngram=0.5)
    finish(second, ngram=1.5)
    one, stays = run_promote(second), run_promote(first)
    assert one.figures["champion"] == stays.figures["champion"] == "ngram" and not stays.figures["promoted"]
    other = run_promote(config_for(storage, tiny_base_dir, promote__force=True))
    assert other.figures["champion"] == read_configuration(Path(other.outputs["configuration"])).name == "plain"
    assert Path(other.outputs["configuration"]).parent.parent == RunPaths.of(first).stage("promote")  # beside the first one
    assert run_promote(first).skipped
    again = run_promote(second)  # its bench is older than the champion: it does not take the alias back
    assert again.skipped and again.figures["champion"] == "plain" and again.outputs == one.outputs
    with pytest.raises(InputError, match=r"none of the 2 benches of this run has these settings") as caught:
        run_promote(config_for(storage, tiny_base_dir, bench__limit=7))
    told = str(caught.value)
    assert "bench (bench.limit=None)" in told and "others.jsonl, bench.limit=3)" in told and "\n" not in told


def test_what_won_is_what_is_promoted(tiny_base_dir: Path, tiny_base: Base, storage: Path) -> None:
    """`combined` drafts with the last of several heads, a drafter with its own. The configuration holds those files."""
    config = config_for(storage, tiny_base_dir, promote__force=True)  # the same bench twice
    folder = finish(config, medusa=1.2, hydra=1.4, combined=1.8)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for kind in ("medusa", "hydra"):
        save_checkpoint(storage / kind, random_heads(tiny_base, kind), tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
        report["plan"]["heads"][kind] = str(storage / kind)
    digests = {kind: file_digest(storage / kind / "model.safetensors") for kind in ("medusa", "hydra")}
    for speed, winner, heads in ((1.8, "combined", "hydra"), (1.3, "hydra", "hydra")):
        report["methods"]["combined"]["speed_vs_plain"] = speed
        write_text(folder / "report.json", json.dumps(report))
        result = run_promote(config)
        made = read_configuration(Path(result.outputs["configuration"]))
        assert result.figures["champion"] == made.name == winner
        assert made.drafter == ("combined" if winner == "combined" else "heads") and made.heads is not None
        assert file_digest(made.heads / "model.safetensors") == digests[heads]
        shutil.rmtree(Path(result.outputs["configuration"]).parent)


def test_a_bench_of_an_earlier_version_is_found(tiny_base_dir: Path, tiny_base: Base, storage: Path) -> None:
    """Under the fingerprint that it was given: with the names that settings had."""
    save_checkpoint(storage / "heads", random_heads(tiny_base, "hydra"), tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    config = config_for(storage, tiny_base_dir, bench__max_batch_size=4, bench__concurrency=[1, 3],
                        bench__concurrency_requests=9, bench__methods=["ngram", "bundled"])
    names = {"max_batch_size": "running_batch", "concurrency": "load", "concurrency_requests": "load_requests"}
    settings = {names.get(name, name): value for name, value in config.bench.model_dump().items()}
    settings["methods"] = ("ngram", "shipped")
    for later in ("champion", "shared_answers", "prefix_cache_tokens", "vllm_python", "vllm_settings"):  # change nothing here
        settings.pop(later)
    upstream = {"base": resolve_base(str(tiny_base_dir), storage / "cache").digest,
                "prompts": file_digest(Path(str(config.bench.prompts)))}
    for file in ("model.safetensors", "tree.json"):
        upstream[f"shipped/{file}"] = file_digest(storage / "heads" / file)
    wanted = fingerprint("bench", {"bench": settings, "ngram": config.ngram.model_dump(),
                                   "base": config.base.model_dump(exclude={"model"})}, upstream)
    assert bench_fingerprint(config, {"bundled": str(storage / "heads")}) == wanted
    earlier = config_for(storage, tiny_base_dir, bench__running_batch=4, bench__load=[1, 3], bench__load_requests=9,
                         bench__methods=["ngram", "shipped"])
    assert bench_fingerprint(earlier, {"bundled": str(storage / "heads")}) == wanted


def test_a_report_of_an_earlier_version_is_promoted(tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(storage, tiny_base_dir)
    folder = finish(config, bundled=1.5)
    save_checkpoint(storage / "heads", random_heads(tiny_base, "hydra"), tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report["methods"]["shipped"] = report["methods"].pop("bundled")
    report["plan"]["heads"] = {"shipped": str(storage / "heads")}
    write_text(folder / "report.json", json.dumps(report))
    assert run_promote(config).figures["champion"] == "bundled"


def test_the_earlier_word_for_bundled_heads_warns_once(tiny_base_dir: Path, storage: Path,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    folders._warn_once.cache_clear()
    config = config_for(storage, tiny_base_dir, bench__methods=["shipped", "bundled", "ngram"])
    with caplog.at_level(logging.WARNING):
        assert find_methods(config, {"bundled": "folder"}) == ("plain", "bundled", "ngram")
        assert find_methods(config, {"bundled": "folder"})[1] == "bundled"
    assert [record.message for record in caplog.records] == ["`shipped` is called `bundled` now"]


def test_rows_of_an_earlier_version(tmp_path: Path) -> None:
    values = {"round": 0, "question": "1", "category": "all", "method": "shipped", "token_ids": [1], "steps": 1,
              "prefill_seconds": 1.0, "decode_seconds": 1.0}
    lines = [values, values | {"method": "shipped@8"}, values | {"method": "ngram"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert [row.method for row in read_rows(tmp_path / "rows.jsonl")] == ["bundled", "bundled@8", "ngram"]
