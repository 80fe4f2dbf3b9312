"""Mistakes with object stores, as commands tell them: exit 2 or 1 within seconds, one line that names the setting."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from hydra_core import storage
from hydra_core.files import atomic_file
from hydra_core.storage import as_path, listing
from jobs.runner import read_config, run
from tests.pipelines.batch.stand_in import StandIn


@pytest.fixture
def words(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with atomic_file(as_path(f"{s3}/p.jsonl")) as path:
        path.write_text(json.dumps({"prompt": "x"}) + "\n", encoding="utf-8")
    with StandIn() as server:
        yield [f"storage={tmp_path}", f"batch.input={s3}/p.jsonl", f"batch.output={s3}/out", f"batch.address={server.address}"]


def told(words: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capfd.readouterr()
    code = run("batch", words)
    lines = capfd.readouterr().err.splitlines()
    assert lines and "Traceback" not in "".join(lines)
    return code, lines[-1]


def test_a_missing_bucket(words: list[str], s3: str, capfd: pytest.CaptureFixture[str]) -> None:
    for field, place in (("batch.output", "s3://no-such-bucket/out"), ("storage", "s3://no-such-bucket/runs")):
        code, line = told([*words, f"{field}={place}"], capfd)
        assert code == 2 and line.startswith(f"error: {field}={place}: no such bucket ("), line
    assert listing(as_path(s3)).keys() == {"p.jsonl"}, "the probe leaves nothing"


def test_keys_that_are_wrong_or_missing(words: list[str], s3: str, s3_server: ThreadedMotoServer,
                                        monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(storage.OPTIONS, "skip_instance_cache", True)
    host, port = s3_server.get_host_and_port()

    def requests_without_a_check(number: bytes) -> None:
        address = f"http://{host}:{port}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(address, number, {"Content-Type": "text/plain"}, method="POST")).close()

    requests_without_a_check(b"0")
    try:
        code, line = told(words, capfd)
    finally:
        requests_without_a_check(b"inf")
    assert code == 2 and line.startswith(f"error: batch.output={s3}/out: the store refuses access ("), line
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    code, line = told(words, capfd)
    assert code == 2 and line.startswith(f"error: batch.output={s3}/out: no credentials are found ("), line


def test_a_store_that_does_not_answer(words: list[str], s3: str, monkeypatch: pytest.MonkeyPatch,
                                      capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setitem(storage.OPTIONS, "skip_instance_cache", True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code, line = told(words, capfd)
    assert code == 1 and line.startswith(f"error: batch.output={s3}/out: the store does not answer ("), line


def test_a_tracking_database_cannot_lie_in_a_bucket(words: list[str], s3: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, line = told([*words, f"storage={s3}/runs"], capfd)
    assert code == 2 and line == (f"error: storage={s3}/runs: MLflow's database cannot lie there: set tracking.uri or "
                                  "MLFLOW_TRACKING_URI to the address of an MLflow server")


def test_a_uri_is_kept_as_it_is(s3: str) -> None:
    """It is no relative path, inside a submitted job neither; `file://` is a path."""
    found = read_config("batch", None, [f"storage={s3}/runs/", f"batch.input={s3}/p.jsonl", "serve.model=file:///models/mine",
                                        f"distill.heads={s3}/heads", f"train.start={{hydra: {s3}/heads}}"])
    assert found.storage == f"{s3}/runs" and found.batch.input == f"{s3}/p.jsonl" and found.serve.model == "/models/mine"
    assert found.distill.heads == found.train.start["hydra"] == f"{s3}/heads"
