"""An endpoint that follows a real MLflow server, which delivers its webhook; and what the endpoint records meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, naive_generate, save_configuration
from hydra_core.sampling import Request
from pipelines.config import RunConfig, load_config
from pipelines.rows.served_records import ServedRecord, read_records, record_parts
from pipelines.serve import webhook
from pipelines.serve.served_app import ServedApp
from pipelines.serve.stage import resolve_args, start_app, with_running_settings
from pipelines.tracking import Tracker, register
from tests.broken_heads import break_heads
from tests.pipelines.serve.clients import MODEL, log_lines, scraped, until
from tests.pipelines.serve.test_live_heads import replicas
from tests.pipelines.serve.test_stage import free_port

pytestmark = [pytest.mark.slow, pytest.mark.drawn]
SECRET = "a secret of this test"
NAME = "followed"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An MLflow server that may deliver webhooks to this machine."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    environment = {**os.environ, "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
                   "MLFLOW_WEBHOOK_CACHE_TTL": "0", "MLFLOW_TRACKING_URI": ""}
    process = subprocess.Popen([
        sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1",
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts"],
        env=environment, stdout=(folder / "log").open("wb"), stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return httpx.get(f"{address}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            time.sleep(0.5)
            return False

    until(answers, (folder / "log").read_text("utf-8")[-2000:])
    yield address, process
    stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture(scope="module")
def config(server: tuple[str, object], tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("followed")
    (root / "secret").write_text(SECRET, encoding="utf-8")
    (root / "secret").chmod(0o600)
    return load_config(None, {
        "storage": str(root / "storage"), "base.model": str(tiny_base_dir), "base.dtype": "fp32", "tracking.uri": server[0],
        "promote.model_name": NAME, "serve.model": f"models:/{NAME}@champion", "serve.port": free_port(),
        "serve.follow_registry": 0, "serve.webhook_secret_file": str(root / "secret"), "serve.workers.threads": 1,
        "serve.record.share": 1.0, "serve.record.rows_per_file": 2})


def promoted(config: RunConfig, folder: Path) -> int:
    """Register a configuration, which the alias names then."""
    with Tracker.open(config).start("promote") as run:
        run.log_artifact(folder, "configuration")
        return register(config, NAME, run, "configuration", "champion", {})


@pytest.fixture(scope="module")
def app(local_ray: None, config: RunConfig, tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedApp]:
    """Decodes with version 1: copied text."""
    folder = tmp_path_factory.mktemp("first") / "ngram"
    save_configuration(folder, DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    assert promoted(config, folder) == 1
    served = start_app(config, with_running_settings(config, resolve_args(config)))
    yield served
    served.stop()


def version(app: ServedApp) -> int:
    found: int = httpx.get(f"{app.url}/v1/models", timeout=60).json()["data"][0]["version"]
    return found


def test_heads_follow_the_alias(app: ServedApp, config: RunConfig, server: tuple[str, subprocess.Popen[bytes]],
                                configuration: Path, tiny_base: Base, tmp_path: Path) -> None:
    MlflowClient(server[0]).create_webhook("endpoint", f"{app.url}{webhook.PATH}", ["model_version_alias.created"], secret=SECRET)
    stood = replicas()
    assert version(app) == 1
    assert ask(app)["choices"] and promoted(config, configuration) == 2
    until(lambda: version(app) == 2, "the endpoint does not follow")
    assert replicas() == stood

    broken = tmp_path / "broken"
    break_heads(configuration / "heads", broken / "heads", "misshapen key")
    (broken / "configuration.json").write_bytes((configuration / "configuration.json").read_bytes())
    assert promoted(config, broken) == 3
    until(lambda: len(logged("are rejected, the earlier ones stay")) == 1, "nobody says that they are rejected")
    MlflowClient(server[0]).set_registered_model_alias(NAME, "champion", "3")  # delivered again, and not tried again
    assert version(app) == 2 and replicas() == stood

    MlflowClient(server[0]).set_registered_model_alias(NAME, "champion", "1")
    until(lambda: version(app) == 1, "the endpoint does not go back")
    assert len(logged("are rejected, the earlier ones stay")) == 1
    MlflowClient(server[0]).delete_registered_model_alias(NAME, "champion")
    wake(app)
    until(lambda: len(logged("does not say what to decode with")) == 1, "nobody says that the alias names nothing")
    check_records(app, config, tiny_base)


def test_a_dead_registry_stops_nothing(app: ServedApp, server: tuple[str, subprocess.Popen[bytes]]) -> None:
    stop(server[1])
    before, stood = len(logged("no MLflow server answers there")), replicas()
    for delivery in ("first", "second"):
        wake(app)
        assert ask(app)["choices"], delivery
    until(lambda: len(logged("no MLflow server answers there")) == before + 1, "nobody says that the registry is silent")
    scraped({"ray_hydra_registry_answers", "ray_hydra_registry_changes_total", "ray_hydra_recorded_answers_total"})
    assert version(app) == 1 and replicas() == stood


def ask(app: ServedApp) -> dict[str, list[object]]:
    answer = httpx.post(f"{app.url}/v1/completions", json={"model": MODEL, "prompt": "hello", "max_tokens": 12, "temperature": 0},
                        timeout=60)
    found: dict[str, list[object]] = answer.json()
    return found


def wake(app: ServedApp) -> None:
    """A delivery of our own, which has nobody's name in it."""
    body, now = b"{}", str(int(time.time()))
    delivery = f"own-{time.monotonic_ns()}"
    headers = {webhook.SIGNATURE: webhook.signature(SECRET, delivery, now, body), webhook.TIMESTAMP: now,
               webhook.DELIVERY: delivery, "Content-Type": "application/json"}
    assert httpx.post(f"{app.url}{webhook.PATH}", content=body, headers=headers, timeout=60).status_code == 202


def logged(text: str) -> list[str]:
    return [line["message"] for line in log_lines() if text in line["message"]]


def check_records(app: ServedApp, config: RunConfig, base: Base) -> None:
    """What stands in the folder is what was answered, and no more than that."""
    for _ in range(4):
        ask(app)
    folder = Path(config.storage) / "served" / config.serve.app_name
    until(lambda: len(record_parts(folder)) >= 2, "nothing is recorded")
    record = next(read_records(record_parts(folder)[-1][0]))
    assert isinstance(record, ServedRecord) and record.from_the_base and record.base == str(base.identity)
    prompt = tuple(base.tokenizer("hello").input_ids)
    assert record.prompt_ids == prompt
    assert record.response_ids == naive_generate(base, Request("x", prompt, 12)).token_ids
    assert 1 + sum(record.accepted) + len(record.accepted) == len(record.response_ids)
    assert SECRET not in json.dumps(vars(record))
