"""Offline generation through the Serve handle: every row exactly once, whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray import serve

from hydra_core.base import Base
from hydra_core.decoding import Request, naive_generate
from hydra_core.errors import InputError
from pipelines.batch import run_batch
from pipelines.batch_worker import read_batch_rows
from pipelines.config import RunConfig, load_config
from tests.pipelines.test_serve import free_port

pytestmark = pytest.mark.slow


def config_for(storage: Path, base: Path, **changes: object) -> RunConfig:
    values = {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "serve.model": "plain",
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
                     + b'{"prompt": "b", "id": "k"}\n')
    config = config_for(storage, tiny_base_dir, batch__input=str(path), batch__format=kind, batch__max_error_share=0.5,
                        batch__rows_per_file=8)
    result = run_batch(config)
    rows = list(read_batch_rows(Path(result.outputs["rows"]), kind))
    assert len(rows) == 21 == len({row["id"] for row in rows})
    assert (result.figures["rows"], result.figures["errors"], result.figures["skipped"]) == (21, 3, 1)
    for row in rows:
        if row["row"] <= 20:
            prompt = tuple(tiny_base.encode_prompt(f"question {row['row'] - 1}"))
            wanted = naive_generate(tiny_base, Request("x", prompt, 12))
            assert tuple(row["token_ids"]) == wanted.token_ids and row["text"] == tiny_base.decode(wanted.token_ids)
            assert row["finish_reason"] == wanted.finish_reason and row["latency_seconds"] > 0
    errors = [row for part in Path(result.outputs["errors"]).glob("*.parquet") for row in pq.read_table(part).to_pylist()]
    assert sorted(row["message"].split(":")[0] for row in errors) == ["prompt", "row 21", "row 22"]
    assert not serve.status().applications  # nothing is left running
    assert run_batch(config).skipped
    with pytest.raises(InputError, match="another run"):
        run_batch(config_for(storage, tiny_base_dir, batch__input=str(path), batch__max_new_tokens=5))


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
    assert 4 * len(before) <= result["figures"]["resumed"] < 120
