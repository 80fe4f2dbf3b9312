"""`batch` from an S3 bucket to an S3 bucket: the same rows as in folders, whatever kills it, and one run at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hydra_core.errors import InputError
from hydra_core.files import atomic_file
from hydra_core.storage import as_path, listing
from pipelines.batch.stage import MIXED, run_batch
from pipelines.batch.writer import read_batch_rows
from pipelines.config import RunConfig, load_config
from pipelines.runtime import lease
from pipelines.runtime.artifacts import read_manifest
from tests.conftest import ROOT
from tests.pipelines.batch.stand_in import A, StandIn

ROWS = 30


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as found:
        yield found


@pytest.fixture
def values(s3: str, storage: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with atomic_file(as_path(f"{s3}/in/p.jsonl")) as path:
        path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(ROWS)), encoding="utf-8")
    return {"storage": str(storage), "batch.input": f"{s3}/in/p.jsonl", "batch.output": f"{s3}/out", "batch.rows_per_file": 4,
            "batch.concurrency": 2, "batch.address": server.address}


def texts(config: RunConfig, kind: str) -> dict[int, str]:
    rows = list(read_batch_rows(as_path(f"{config.batch.target}/rows"), kind))
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["row"]: row["text"] for row in rows}


ANSWERS = {number + 1: f"{A.base}: question {number}" for number in range(ROWS)}


@pytest.mark.slow
def test_a_killed_job_goes_on_with_what_is_published(values: dict[str, Any], server: StandIn, s3: str) -> None:
    """Killed by SIGKILL in the middle of a row; nothing half is there, and no answer is asked for again but those in flight."""
    stuck, begun = threading.Event(), threading.Event()

    def hang(number: int, _: dict[str, Any]) -> None:
        if number > 14:
            begun.set()
            stuck.wait(60)

    server.instead = hang
    job = subprocess.Popen([sys.executable, "-m", "jobs.batch", *(f"{name}={value}" for name, value in values.items())], cwd=ROOT,
                           env={**os.environ, "MLFLOW_TRACKING_URI": ""}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out = as_path(f"{s3}/out")
    assert begun.wait(120)
    while len(texts_there := [name for name in listing(out) if name.startswith("rows/")]) < 3:
        assert job.poll() is None
        time.sleep(0.05)
    config = load_config(None, values)
    with pytest.raises(InputError, match=rf"batch\.output={s3}/out: another run writes to it \(process {job.pid} on "):
        run_batch(config)
    job.kill()
    job.wait()
    stuck.set()
    server.instead, before = lambda *_: None, len(server.asked)
    standing = texts(config, "jsonl")
    assert len(standing) == 4 * len(texts_there) and standing.items() <= ANSWERS.items() and read_manifest(out) is None
    result = run_batch(config)
    assert (result.figures["rows"], result.figures["errors"], result.figures["resumed"]) == (ROWS, 0, len(standing))
    assert len(server.asked) - before == ROWS - len(standing) and texts(config, "jsonl") == ANSWERS
    names = listing(out).keys()
    assert {"_SUCCESS", "claim.json", "config.yaml", "manifest.json", "provenance.json", "report.json"} < names
    assert all(re.match(r"rows/part-", name) for name in names if name.count("/")) and listing(lease.lease_folder(out)) == {}
    assert result.outputs["rows"] == f"{s3}/out/rows" and run_batch(config).skipped and len(server.asked) - before < ROWS


@pytest.mark.slow
def test_rows_are_those_of_a_folder(values: dict[str, Any], tmp_path: Path, s3: str, server: StandIn) -> None:
    """The same job with folders, Parquet in and out; a part that is lost or changed is made again, and only that."""
    table = pa.table({"prompt": [f"question {i}" for i in range(ROWS)]})
    for place in (as_path(f"{s3}/in/table.parquet"), tmp_path / "table.parquet"):
        with atomic_file(place) as path:
            pq.write_table(table, path)
    there = load_config(None, values | {"batch.input": f"{s3}/in/table.parquet", "batch.format": "parquet"})
    here = load_config(None, values | {"batch.input": str(tmp_path / "table.parquet"), "batch.output": str(tmp_path / "out"),
                                       "batch.format": "parquet"})
    run_batch(there)
    run_batch(here)
    assert texts(there, "parquet") == texts(here, "parquet") == ANSWERS
    parts = [name for name in listing(as_path(f"{s3}/out")) if name.startswith("rows/")]
    with atomic_file(as_path(f"{s3}/out/{parts[0]}")) as path:
        path.write_bytes(b"x" * listing(as_path(f"{s3}/out"))[parts[0]].bytes)  # same size: the store's tag tells
    as_path(f"{s3}/out/{parts[1]}").unlink()
    before = len(server.asked)
    assert not run_batch(there).skipped and texts(there, "parquet") == ANSWERS and len(server.asked) - before == 8


def test_an_input_that_changes_and_an_output_of_another_run(values: dict[str, Any], s3: str, server: StandIn) -> None:
    config = load_config(None, values)
    run_batch(config)
    with pytest.raises(InputError, match=f"{s3}/out: holds the `batch` output of another run"):
        run_batch(load_config(None, values | {"batch.max_new_tokens": 5}))
    with atomic_file(as_path(f"{s3}/mine/thesis.txt")) as path:
        path.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=f"{s3}/mine: is not empty and not a `batch` output"):
        run_batch(load_config(None, values | {"batch.output": f"{s3}/mine"}))
    assert listing(as_path(f"{s3}/mine")).keys() == {"thesis.txt"}
    assert not as_path(f"{s3}/out/{MIXED}").exists()
    with pytest.raises(InputError, match=f"batch.input={s3}/none.jsonl: no such file"):
        run_batch(load_config(None, values | {"batch.input": f"{s3}/none.jsonl"}))


def test_lines_that_are_no_rows_and_compressed_inputs(values: dict[str, Any], s3: str, make_gz: Callable[[bytes], bytes]) -> None:
    with atomic_file(as_path(f"{s3}/in/p.jsonl.gz")) as path:
        path.write_bytes(make_gz(b'{"prompt": "one"}\noops\n{"prompt": "two"}\n'))
    result = run_batch(load_config(None, values | {"batch.input": f"{s3}/in/p.jsonl.gz", "batch.max_error_share": 0.5}))
    assert (result.figures["rows"], result.figures["errors_input"]) == (2, 1)


@pytest.fixture
def make_gz() -> Callable[[bytes], bytes]:
    import gzip

    return gzip.compress
