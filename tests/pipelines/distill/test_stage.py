"""Rows out of a base: templated once, answered as the naive loop answers, resumable, counted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.decoding import Result, naive_generate
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from jobs.runner import read_config
from pipelines.config import RunConfig, load_config
from pipelines.distill.actors import PromptMaker, WorkerSettings
from pipelines.distill.answers import block_rows
from pipelines.distill.prompts import read_prompts
from pipelines.distill.self_made import make_prompts
from pipelines.distill.stage import distill_fingerprint, distilled, run_distill
from pipelines.rows.parquet_parts import part_files, read_parts, write_part
from pipelines.rows.schemas import ERRORS, FEATURES, PROMPTS, RESPONSES, check_counts, check_schema, split_of
from pipelines.runtime.artifacts import RunPaths, StageResult
from pipelines.runtime.row_flow import Rows
from pipelines.sizing.amounts import Range
from pipelines.sizing.base import shape_of
from pipelines.sizing.distilling import answer_rows_bytes, feature_rows_bytes
from pipelines.sizing.rows import finished_rows, planned_rows
from pipelines.tracking import Tracker
from tests.tiny import save_tiny
from tests.trained import overfit_heads

pytestmark = pytest.mark.slow


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(count)), encoding="utf-8")
    return path


def config_for(storage: Path, base: Path, prompts: Path, **changes: object) -> RunConfig:
    values = {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "prompts.source": "jsonl",
              "prompts.path": str(prompts), "distill.max_new_tokens": 20, "distill.max_batch_size": 4,
              "distill.rows_per_file": 8, "distill.workers.threads": 1, "distill.held_out": 0.3,
              "distill.feature_dtype": "fp32", "distill.max_error_share": 0.5}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def in_this_process(source: list[pa.Table], read: Callable[[pa.Table], Iterable[Rows]], actor: Callable[[Any], Any],
                    settings: WorkerSettings, write: Callable[[Rows], object], **_: object) -> Counter[str]:
    """What tasks and actors of Ray do, without starting any: for tests of what stands around them."""
    totals: Counter[str] = Counter()
    made = actor(settings)
    for rows in (rows for table in source for given in read(table) for rows in made(given)):
        if len(rows.table):
            write(rows)
        totals.update({rows.name: len(rows.table)} | dict(rows.counts))
    return totals


@pytest.fixture(scope="module")
def finished_run(local_ray: None, tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, StageResult]:
    """A finished stage of 20 prompts and one faulty row, which tests look at, or damage and mend."""
    root = tmp_path_factory.mktemp("distilled")
    prompts = write_prompts(root / "p.jsonl", 20)
    with prompts.open("a", encoding="utf-8") as handle:
        handle.write('{"x": 1}\n')
    config = config_for(root / "storage", tiny_base_dir, prompts)
    return config, run_distill(config)


def test_the_plan_reckons_with_the_bytes_that_are_written(finished_run: tuple[RunConfig, StageResult]) -> None:
    """From the file of prompts before the run, with a wide range; from the counted tokens after it, with a narrow one."""
    config, result = finished_run
    folder = RunPaths.of(config).stage("distill")
    base = shape_of(config.base.model, "fp32", None, RunPaths.of(config).cache)
    counted, planned = finished_rows(config), planned_rows(config)
    assert counted is not None and counted.answers == Range.of(40) and planned.answers == Range.of(42)  # a row is no prompt
    assert counted.answer_tokens == Range.of(result.figures["response_tokens"])
    for part, bytes_of in (("features", partial(feature_rows_bytes, config, base)), ("responses", answer_rows_bytes)):
        written = sum(path.stat().st_size for path in part_files(folder / part))
        print(part, written, bytes_of(counted), bytes_of(planned))
        assert bytes_of(counted).low <= written <= bytes_of(counted).high
        assert bytes_of(planned).low <= written <= bytes_of(planned).high


def test_rows_are_the_bases_own(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path) -> None:
    prompts = write_prompts(storage.parent / "p.jsonl", 15)
    with prompts.open("a", encoding="utf-8") as handle:
        handle.write('{"x": 1}\n{"prompt": "question 3"}\n' + json.dumps({"prompt": "long " * 99}) + "\n")
    result = run_distill(config_for(storage, tiny_base_dir, prompts, distill__check_share=1))
    folder = storage / "runs" / "default" / "distill"
    rows = read_parts(folder / "features", FEATURES).to_pylist()
    assert len(rows) == 30 == len({row["id"] for row in rows})
    assert {row["split"] for row in rows} == {"train", "held_out"}
    for row in rows:
        request = Request("x", tuple(row["prompt_ids"]), 20, row["temperature"], row["seed"])
        reference = naive_generate(tiny_base, request)
        assert (tuple(row["response_ids"]), row["finish_reason"]) == (reference.token_ids, reference.finish_reason)
        assert row["base"] == str(tiny_base.identity) and row["split"] == split_of(row["prompt_id"], 0.3)
        hidden = np.frombuffer(row["hidden"], dtype="<f4").reshape(row["hidden_tokens"], row["hidden_width"])
        wanted = tiny_base.hidden_states([row["prompt_ids"] + row["response_ids"]])[0]
        torch.testing.assert_close(torch.from_numpy(hidden.copy()), wanted, atol=1e-4, rtol=1e-4)
    assert result.figures["greedy_reproduced"] > 0.99
    assert "row 16: has no field" in read_parts(folder / "errors" / "prompts", ERRORS)["message"].to_pylist()[0]
    assert len(read_parts(folder / "errors" / "answers", ERRORS)) == 2  # a prompt too long for both of its answers
    counts = {"prompts": 16, "prompt_errors": 1, "prompts_skipped": 1, "responses": 30, "errors": 2}
    assert {name: result.figures[name] for name in counts} == counts
    for contract, part in ((PROMPTS, "prompts"), (RESPONSES, "responses"), (FEATURES, "features")):
        for path in part_files(folder / part):
            check_schema(pq.read_schema(path), contract, str(path))
    assert run_distill(config_for(storage, tiny_base_dir, prompts)).skipped
    with pytest.raises(InputError, match="another run"):
        run_distill(config_for(storage, tiny_base_dir, prompts, distill__max_new_tokens=5))

    # as a kill leaves it: no manifest, half of the answers; what was read still counts
    (folder / "manifest.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "prompts").iterdir()}
    for path in part_files(folder / "responses")[::2]:
        path.unlink()
    again = run_distill(config_for(storage, tiny_base_dir, prompts))
    assert not again.skipped and {name: again.figures[name] for name in counts} == counts
    assert len(read_parts(folder / "errors" / "prompts", ERRORS)) == 1
    assert {path: path.stat().st_mtime_ns for path in (folder / "prompts").iterdir()} == stamps


def test_prompts_that_the_base_writes_besides_those_of_a_file(tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """What a random base writes is no text, so its answers are made up here; all around them is real."""
    prompts = write_prompts(storage.parent / "p.jsonl", 4)
    config = config_for(storage, tiny_base_dir, prompts, prompts__self_made=3, prompts__starts=("", "In German: "))
    folder = storage / "runs" / "default" / "distill"
    given: dict[int, tuple[int, ...]] = {}

    def written(self: PromptMaker, requests: list[Request], what: str) -> Iterator[Result]:
        for request in requests:
            given[int(request.id)] = request.prompt_ids
            text = "question 3" if request.id == "0" else f"word {request.id}"  # the first stands in the file already
            yield Result(request.id, request.prompt_ids, (*tiny_base.tokenizer(text).input_ids, 2), "stop")

    monkeypatch.setattr(PromptMaker, "decode", written)
    for module in ("self_made", "prompts"):
        monkeypatch.setattr(f"pipelines.distill.{module}.run_flow", in_this_process)
    read_prompts(config, folder)
    assert make_prompts(config, folder)["prompts"] == 6  # four, and three of which one was there
    rows = read_parts(folder / "prompts", PROMPTS).to_pylist()
    own = {row["source"]: row["prompt"] for row in rows if row["source"].startswith("self/")}
    assert own == {"self/00000001": "In German: word 1", "self/00000002": "word 2"}
    start = tuple(tiny_base.tokenizer("In German: ", add_special_tokens=False).input_ids)
    assert given[1] == given[0] + start and given[2] == given[0]
    assert make_prompts(config, folder)["self_made"] == 3 and not (folder / "candidates").exists()
    with pytest.raises(InputError, match=r"set prompts\.count"):
        load_config(None, {"storage": str(storage), "prompts.self_made": 3})


def test_what_was_read_is_in_the_tracker(finished_run: tuple[RunConfig, StageResult]) -> None:
    config, result = finished_run
    client = MlflowClient(Tracker.open(config).uri)
    run = client.get_run(result.run_id)
    (found,) = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.source, len(found.dataset.digest)) == ("prompts", config.prompts.path, 32)
    assert run.data.params["distill.held_out"] == "0.3"
    assert "config.yaml" in [artifact.path for artifact in client.list_artifacts(result.run_id)]
    assert client.get_run(Tracker.open(config).parent()).info.status == "FINISHED"


@pytest.mark.parametrize("part", ["prompts", "responses", "features", "errors/prompts"])
def test_a_damaged_output_is_made_again(finished_run: tuple[RunConfig, StageResult], monkeypatch: pytest.MonkeyPatch,
                                        part: str) -> None:
    """And it is the same data to those who build on it, whatever files the rows stand in."""
    config, first = finished_run
    for module in ("answers", "prompts"):
        monkeypatch.setattr(f"pipelines.distill.{module}.run_flow", in_this_process)
    before = distilled(config)
    damaged = part_files(RunPaths.of(config).stage("distill") / part)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    again = run_distill(config)
    assert not again.skipped and run_distill(config).skipped
    for name in ("prompts", "prompt_errors", "responses", "feature_rows", "errors"):
        assert again.figures[name] == first.figures[name], name
    assert distilled(config) == before
    ids = read_parts(RunPaths.of(config).stage("distill") / "features", FEATURES, ["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids))  # hidden states that were stored already are not stored twice


def test_the_fingerprint_knows_the_prompts_and_no_knobs(tiny_base_dir: Path, storage: Path) -> None:
    prompts = write_prompts(storage.parent / "p.jsonl", 3)
    wanted = distill_fingerprint(config_for(storage, tiny_base_dir, prompts))
    assert wanted == distill_fingerprint(config_for(
        storage, tiny_base_dir, prompts, distill__max_batch_size=1, distill__rows_per_file=1, distill__max_error_share=1,
        distill__workers={"count": 2, "cpus": 0.1, "threads": 2}))
    write_prompts(prompts, 4)
    assert wanted != distill_fingerprint(config_for(storage, tiny_base_dir, prompts))


def test_mistakes_are_told_before_anything_is_claimed(tiny_base_dir: Path, storage: Path) -> None:
    """No Ray is started for them, and the corrected command is not refused."""
    prompts = write_prompts(storage.parent / "p.jsonl", 3)
    silent = save_tiny(storage.parent / "silent")
    (silent / "chat_template.jinja").unlink()
    cut = save_tiny(storage.parent / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    broken = save_tiny(storage.parent / "broken")
    (broken / "config.json").write_text("{", encoding="utf-8")
    cases = [(config_for(storage, silent, prompts, prompts__source="self", prompts__path=None), "no chat template"),
             (config_for(storage, tiny_base_dir, prompts, base__context_limit=300), r"base\.context_limit=300"),
             (config_for(storage, cut, prompts), r"base\.model=.*cannot be loaded"),
             (config_for(storage, broken, prompts), r"base\.model=.*cannot be loaded \(config\.json: "),
             (config_for(storage, tiny_base_dir, storage.parent / "none.jsonl"), r"prompts\.path=.*: no such file")]
    for config, words in cases:
        with pytest.raises(InputError, match=words):
            run_distill(config)
        assert not (storage / "runs").exists(), words


def test_killed_job_recomputes_only_what_is_missing(local_ray: None, tiny_base_dir: Path, storage: Path,
                                                    worker_env: dict[str, str]) -> None:
    """Killed with its own Ray, and run again by this process in another one."""
    prompts = write_prompts(storage.parent / "p.jsonl", 150)
    command = [sys.executable, "-m", "jobs.distill", f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32",
               "prompts.source=jsonl", f"prompts.path={prompts}", "distill.max_new_tokens=200", "distill.max_batch_size=2",
               "distill.rows_per_file=4", "distill.workers.threads=1"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | worker_env
    parts = storage / "runs" / "default" / "distill" / "responses"
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400  # other tests take the other core
    while len(part_files(parts)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for one in started:  # workers of Ray, in groups of their own: they end when they miss it, and may write until then
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    assert not psutil.wait_procs(started, timeout=120)[1]
    before = {path.name: path.stat().st_mtime_ns for path in part_files(parts)}
    figures = run_distill(read_config("distill", None, command[3:])).figures
    assert 12 <= 4 * len(before) <= figures["resumed"] < figures["responses"] == 300
    assert all((parts / name).stat().st_mtime_ns == stamp for name, stamp in before.items())
    assert len({row["id"] for row in read_parts(parts, RESPONSES, ["id"]).to_pylist()}) == 300


def test_bad_prompt_files_and_bases(tiny_base_dir: Path, storage: Path) -> None:
    storage.mkdir()
    empty = storage / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="no such folder"):
        run_distill(config_for(storage, storage / "nobase", empty))
    (storage / "pickled").mkdir()
    (storage / "pickled" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="safetensors"):
        run_distill(config_for(storage, storage / "pickled", empty))


def test_mistakes_leave_nothing_behind_and_the_corrected_command_runs(local_ray: None, tiny_base_dir: Path,
                                                                      storage: Path) -> None:
    """An empty file, workers that never fit, and too many bad rows."""
    storage.mkdir()
    prompts = storage / "empty.jsonl"
    prompts.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="is empty"):
        run_distill(config_for(storage, tiny_base_dir, prompts))
    assert not (storage / "runs").exists()
    write_prompts(prompts, 2)
    with pytest.raises(InputError, match=r"distill\.workers: 1 x 64\.0 CPU are asked for, the cluster has 2"):
        run_distill(config_for(storage, tiny_base_dir, prompts, distill__workers={"cpus": 64}))
    bad = storage / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"prompt": 3}\n{"prompt": 4}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.jsonl: 2 of 3 rows failed, .*: row 2: prompt: .* mend the file"):
        run_distill(config_for(storage, tiny_base_dir, bad))
    result = run_distill(config_for(storage, tiny_base_dir, prompts))
    assert not result.skipped
    assert result.figures["responses"] == 4


def test_rows_are_the_same_with_heads(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path) -> None:
    """Greedy and sampled answers, token for token; the fingerprint is the same, since the rows are."""
    prompts = write_prompts(storage.parent / "p.jsonl", 10)
    known = [tuple(tiny_base.encode_prompt(f"question {i}")) for i in range(10)]
    heads = storage.parent / "heads"
    save_checkpoint(heads, overfit_heads(tiny_base, "hydra++", known, tokens=20), tiny_base.identity,
                    TreeSet({1: DraftTree(((0,), (1,), (0, 0)))}), {})
    plain = config_for(storage, tiny_base_dir, prompts, name="plain")
    with_heads = config_for(storage, tiny_base_dir, prompts, name="with-heads", distill__heads=str(heads))
    assert distill_fingerprint(plain) == distill_fingerprint(with_heads)
    rows = []
    for config in (plain, with_heads):
        run_distill(config)
        found = read_parts(storage / "runs" / config.name / "distill" / "responses", RESPONSES).to_pylist()
        rows.append({row["id"]: row for row in found})
    assert rows[0] == rows[1] and len(rows[0]) == 20
    other = save_tiny(storage.parent / "other", seed=1)
    with pytest.raises(InputError, match="these heads belong to base"):
        run_distill(config_for(storage, other, prompts, name="foreign", distill__heads=str(heads)))
    assert not (storage / "runs" / "foreign").exists()


@pytest.mark.parametrize(("rows", "workers", "wanted"), [
    (40, 1, 32), (20, 1, 32), (7000, 6, 32), (200, 6, 9), (60, 6, 4), (10, 6, 2), (0, 6, 1), (8, 2, 4)])
def test_blocks_are_large_for_one_worker_and_shared_out_among_many(rows: int, workers: int, wanted: int) -> None:
    distill = load_config(overrides={"distill.workers.count": workers, "distill.max_batch_size": 4}).distill
    assert block_rows(rows, distill) == wanted


def test_lost_rows_are_our_fault_and_failed_ones_are_told() -> None:
    check_counts("x", 10, 8, 1, 1, 0.1)
    with pytest.raises(RuntimeError, match="10 rows"):
        check_counts("x", 10, 8, 1, 0, 0.5)
    with pytest.raises(InputError, match="2 of 10"):
        check_counts("x", 10, 8, 2, 0, 0.1)


def test_parts_refuse_another_schema(tmp_path: Path) -> None:
    write_part(tmp_path, [{"id": "a", "stage": "s", "message": "m"}], ERRORS)
    with pytest.raises(InputError, match=r"part-.*column prompt_id is missing"):
        read_parts(tmp_path, PROMPTS)
    part_files(tmp_path)[0].write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read"):
        read_parts(tmp_path, ERRORS)
