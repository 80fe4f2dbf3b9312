"""Offline generation through the Serve handle: every row exactly once, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import serve

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, Request, naive_generate, save_configuration
from hydra_core.errors import InputError
from pipelines.batch import batch_finished, run_batch
from pipelines.batch_worker import read_batch_rows
from pipelines.config import RunConfig, load_config
from pipelines.serve import start_app
from pipelines.tracking import Tracker, register
from tests.pipelines.test_serve import free_port
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow


def config_for(storage: Path, base: Path, **changes: object) -> RunConfig:
    values: dict[str, object] = {
        "storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "serve.model": "plain",
        "serve.port": free_port(), "serve.workers.threads": 1, "batch.max_new_tokens": 12}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(count)), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_errors_and_report(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path, kind: str) -> None:
    path = write_rows(storage.parent / "in.jsonl", 20)
    with path.open("ab") as handle:
        handle.write(b'{"x": 1}\n\xff\n' + json.dumps({"prompt": "long " * 100}).encode() + b'\n{"prompt": "a", "id": "k"}\n'
                     + b'{"prompt": "b", "id": "k"}\n{"prompt": "half a pair: \\ud800"}\n{"prompt": "c", "id": "\\udfff"}\n'
                     + b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n')
    config = config_for(storage, tiny_base_dir, batch__input=str(path), batch__format=kind, batch__max_error_share=0.5,
                        batch__rows_per_file=8)
    result = run_batch(config)
    rows = list(read_batch_rows(Path(result.outputs["rows"]), kind))
    assert len(rows) == 21 == len({row["id"] for row in rows})
    assert (result.figures["rows"], result.figures["errors"], result.figures["rows_skipped"]) == (21, 6, 1)
    for row in rows:
        if row["row"] <= 20:
            prompt = tuple(tiny_base.encode_prompt(f"question {row['row'] - 1}"))
            wanted = naive_generate(tiny_base, Request("x", prompt, 12))
            assert tuple(row["token_ids"]) == wanted.token_ids and row["text"] == tiny_base.decode(wanted.token_ids)
            assert row["finish_reason"] == wanted.finish_reason and row["latency_seconds"] > 0
    errors = [row for part in Path(result.outputs["errors"]).glob("*.parquet") for row in pq.read_table(part).to_pylist()]
    assert sorted(row["message"].split(":")[0] for row in errors) == [
        "prompt", "row 21", "row 22", "row 26", "row 27", "row 28"]
    assert not serve.status().applications  # nothing is left running
    assert run_batch(config).skipped and batch_finished(config)
    with pytest.raises(InputError, match="another run"):
        run_batch(config_for(storage, tiny_base_dir, batch__input=str(path), batch__max_new_tokens=5))


def test_done_means_the_same_answers(local_ray: None, tiny_base_dir: Path, storage: Path) -> None:
    path = write_rows(storage.parent / "in.jsonl", 3)
    make: Callable[..., RunConfig] = lambda **changes: config_for(  # noqa: E731
        storage, tiny_base_dir, batch__input=str(path), batch__max_new_tokens=4, **changes)
    assert not batch_finished(make())
    run_batch(make())
    copied = path.rename(storage.parent / "moved.jsonl")
    for same in ({"batch.concurrency": 2}, {"batch.rows_per_file": 1}, {"batch.max_error_share": 1}, {"serve.port": 0},
                 {"base.context_limit": 256}, {}):
        assert batch_finished(make(**{**same, "batch.input": str(copied)})), same
    for other in ({"base.dtype": "bf16"}, {"base.context_limit": 100}, {"base.model": str(save_tiny(storage / "b", seed=1))},
                  {"batch.temperature": 1.0}, {"batch.limit": 2}, {"batch.format": "jsonl"}):
        config = make(**{"batch.input": str(copied), **other})
        assert not batch_finished(config), other
        with pytest.raises(InputError, match="another run"):
            run_batch(config)


def test_a_new_champion_is_new_work(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_for(storage, tiny_base_dir, batch__input=str(write_rows(storage.parent / "in.jsonl", 3)),
                        serve__model=None)
    with pytest.raises(InputError, match="run `hydra-heads promote`"):
        batch_finished(config)

    def promote(name: str, drafter: Literal["plain", "ngram"]) -> None:
        folder = storage / name
        save_configuration(folder, DecodingConfiguration(drafter, drafter, tiny_base.identity))
        with Tracker.open(config).start("promote") as run:
            run.log_artifact(folder, "configuration")
            register(config, "hydra-heads", run, "configuration", "champion", {})

    promote("first", "plain")
    result = run_batch(config)
    assert result.figures["model"] == "models:/hydra-heads/1" and batch_finished(config)
    params = MlflowClient(Tracker.open(config).uri).get_run(result.run_id).data.params
    assert params["base.model"] == str(tiny_base_dir) and params["batch.max_new_tokens"] == "12"
    promote("the same again", "plain")
    assert batch_finished(config)
    promote("second", "ngram")
    assert not batch_finished(config)
    with pytest.raises(InputError, match="another run"):
        run_batch(config)


def test_an_application_that_runs_is_used_if_it_gives_the_answers_asked_for(local_ray: None, tiny_base_dir: Path,
                                                                            storage: Path) -> None:
    path = write_rows(storage.parent / "in.jsonl", 3)
    make: Callable[..., RunConfig] = lambda **changes: config_for(  # noqa: E731
        storage, tiny_base_dir, batch__input=str(path), batch__max_new_tokens=4, **changes)
    app = start_app(make())
    try:
        result = run_batch(make(batch__output=str(storage / "used")))
        assert result.figures["rows"] == 3 and serve.status().applications["hydra-heads"].status == "RUNNING"
        with pytest.raises(InputError, match=r"runs plain \(base .*:fp32, .*but plain \(base .*:bf16, .*is asked for") as caught:
            run_batch(make(batch__output=str(storage / "other"), base__dtype="bf16"))
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match=r"context 256, .*context 100, "):
            run_batch(make(batch__output=str(storage / "shorter"), base__context_limit=100))
        assert serve.status().applications["hydra-heads"].status == "RUNNING"
    finally:
        app.stop()


def test_parquet_input(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path) -> None:
    path = storage.parent / "in.parquet"
    chat = [{"role": "user", "content": "question 2"}]
    pq.write_table(pa.table({
        "id": ["a", "b", "c", "d"], "prompt": ["question 0", "question 1", None, None],
        "messages": pa.array([None, None, chat, None], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    }), path)
    result = run_batch(config_for(storage, tiny_base_dir, batch__input=str(path), batch__max_error_share=0.5))
    rows = {row["id"]: row for row in read_batch_rows(Path(result.outputs["rows"]), "parquet")}
    assert (set(rows), result.figures["errors"]) == ({"a", "b", "c"}, 1)
    for number, row in enumerate(rows[name] for name in "abc"):
        prompt = tuple(tiny_base.encode_prompt(f"question {number}"))
        assert tuple(row["token_ids"]) == naive_generate(tiny_base, Request("x", prompt, 12)).token_ids


def test_a_dead_tracking_server_leaves_no_claim(local_ray: None, tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir, batch__input=str(write_rows(storage.parent / "in.jsonl", 3)),
                        tracking__uri="http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"tracking\.uri=http://127\.0\.0\.1:9"):
        run_batch(config)
    assert not (storage / "runs" / "default" / "batch").exists()


def test_bad_input(local_ray: None, tiny_base_dir: Path, storage: Path) -> None:
    storage.mkdir()
    empty, wrong = storage / "empty.jsonl", storage / "wrong.jsonl"
    empty.write_text("", encoding="utf-8")
    wrong.write_text('{"text": "x"}\n', encoding="utf-8")
    for path, word in ((empty, "empty"), (wrong, "no field `prompt`"), (storage / "none.jsonl", "no such file")):
        with pytest.raises(InputError, match=word):
            run_batch(config_for(storage, tiny_base_dir, batch__input=str(path)))
    assert not (storage / "runs" / "default" / "batch").exists()


def test_killed_job_goes_on(tiny_base_dir: Path, storage: Path, worker_env: dict[str, str]) -> None:
    path = write_rows(storage.parent / "in.jsonl", 120)
    output = storage.parent / "out"
    command = [sys.executable, "-m", "jobs.batch", f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32",
               "serve.model=plain", f"serve.port={free_port()}", f"batch.input={path}", f"batch.output={output}",
               "batch.max_new_tokens=150", "batch.rows_per_file=4", "batch.concurrency=4", "serve.workers.threads=1"]
    environment = {**os.environ, **worker_env}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(output.glob("rows/part-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {part.name: part.stat().st_mtime_ns for part in output.glob("rows/part-*")}
    assert before and not (output / "manifest.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    after = {part.name: part.stat().st_mtime_ns for part in output.glob("rows/part-*")}
    assert all(after[name] == stamp for name, stamp in before.items())  # nothing finished was made again
    rows = list(read_batch_rows(output / "rows", "parquet"))
    assert len(rows) == 120 == len({row["id"] for row in rows})
    assert 4 * len(before) <= result["resumed"] < 120
