"""Replicas whose every slot is taken: what is asked about them, an update and a key change need none."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import ray

from hydra_core.base import load_base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from pipelines.config import RunConfig, load_config
from pipelines.serve.api_keys import key_digests
from pipelines.serve.instance import ask_front, ask_replicas
from pipelines.serve.served_app import ServedApp
from pipelines.serve.stage import resolve_args, update_app
from tests.pipelines.serve.clients import KEY, MODEL, until
from tests.pipelines.serve.test_live_heads import replicas
from tests.pipelines.serve.test_stage import environment_of, free_port
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow
ENDLESS = {"model": MODEL, "prompt": "hello", "max_tokens": 16_000, "ignore_eos": True, "temperature": 1.0, "stream": True}
SECONDS = 5.0
"""In which an answer from memory comes, on a machine on which everything else runs too."""


@pytest.fixture(scope="module")
def long_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers to it last longer than these tests."""
    return save_tiny(tmp_path_factory.mktemp("long"), max_position_embeddings=2**15)


@pytest.fixture(scope="module")
def config(long_base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY, encoding="utf-8")
    keys.chmod(0o600)
    return load_config(None, {
        "storage": str(tmp_path_factory.mktemp("storage")), "base.model": str(long_base), "base.dtype": "fp32",
        "serve.model": "plain", "serve.port": free_port(), "serve.max_batch_size": 1, "serve.max_new_tokens": 16_000,
        "serve.api_keys_file": str(keys), "serve.require_keys": True, "serve.workers.threads": 1})


@pytest.fixture
def http(app: ServedApp) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=SECONDS) as found:
        yield found


def ask(app: ServedApp, body: dict[str, object]) -> socket.socket:
    """A request whose answer nobody reads yet."""
    address, text = urlsplit(app.url), json.dumps(body).encode()
    asked = socket.create_connection((address.hostname, address.port))
    asked.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
                  f"Content-Length: {len(text)}\r\n\r\n".encode() + text)
    return asked


@pytest.fixture
def full(app: ServedApp) -> Iterator[None]:
    """Two answers more than a replica takes, none of which ends before the test does."""
    asked = [ask(app, ENDLESS | {"seed": seed}) for seed in range(4)]
    until(lambda: ask_front(app.name)["in_flight"] == 4, "not asked")
    until(lambda: ask_replicas(app.name)["in_flight"] == 2, "not full")
    yield
    for one in asked:
        one.close()
    until(lambda: ask_front(app.name)["in_flight"] == 0, "rows are held")


def test_full_replicas_are_ready_and_can_be_updated(full: None, http: httpx.Client, config: RunConfig, long_base: Path,
                                                    app: ServedApp, tmp_path: Path) -> None:
    stood = replicas()
    ready = http.get("/ready")
    assert ready.status_code == 200 and (ready.json()["running"], ready.json()["in_flight"]) == (1, 2)
    assert http.get("/v1/models").json()["data"][0]["configuration"] == "plain"
    base = load_base(str(long_base), dtype="fp32", cache=tmp_path / "cache")
    save_configuration(tmp_path / "ngram", DecodingConfiguration("ngram", "ngram", base.identity))
    other = config.model_copy(update={"serve": config.serve.model_copy(update={"model": str(tmp_path / "ngram")})})
    update_app(resolve_args(other))
    assert http.get("/v1/models").json()["data"][0]["configuration"] == str(tmp_path / "ngram")
    assert http.get("/ready").json()["in_flight"] == 2 and replicas() == stood


def test_an_update_from_another_process_keeps_the_replicas(app: ServedApp, http: httpx.Client, config: RunConfig,
                                                           worker_env: dict[str, str]) -> None:
    """Another driver has another runtime environment, and no keys here: those of the endpoint stay."""
    stood, serve = replicas(), config.serve
    done = subprocess.run(
        [sys.executable, "-m", "jobs.serve", "--update", f"ray_address={ray.get_runtime_context().gcs_address}",
         f"storage={config.storage}", f"base.model={config.base.model}", "base.dtype=fp32", "serve.model=plain",
         f"serve.max_batch_size={serve.max_batch_size}"],
        env={**environment_of(worker_env), "RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["model"] == "plain"
    assert http.get("/v1/models").json()["data"][0]["configuration"] == "plain" and replicas() == stood
    assert httpx.get(f"{app.url}/v1/models", timeout=SECONDS).status_code == 401


def test_keys_are_changed_and_no_replica_is(app: ServedApp, http: httpx.Client, config: RunConfig, tmp_path: Path) -> None:
    stood, keys = replicas(), tmp_path / "keys"
    keys.write_text("another-key-0123456789", encoding="utf-8")
    keys.chmod(0o600)
    args = resolve_args(config)
    update_app(dataclasses.replace(args, api_key_digests=key_digests(str(keys))))
    new = {"Authorization": "Bearer another-key-0123456789"}
    assert http.get("/v1/models").status_code == 401 and http.get("/v1/models", headers=new).status_code == 200
    update_app(args)
    assert http.get("/v1/models", headers=new).status_code == 401 and http.get("/v1/models").status_code == 200
    assert replicas() == stood


def test_bodies_that_never_come_lock_nobody_out(app: ServedApp, http: httpx.Client) -> None:
    address = urlsplit(app.url)
    held = [socket.create_connection((address.hostname, address.port)) for _ in range(400)]
    try:
        for one in held:
            one.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
        for one in held:  # answered without it, or refused while 400 come at once
            one.settimeout(30)
            assert re.search(rb"^HTTP/1.1 (200|429) ", one.recv(100))
        assert http.get("/v1/models").status_code == 200
        assert http.post("/v1/completions", json=ENDLESS | {"max_tokens": 2, "stream": False}).status_code == 200
    finally:
        for one in held:
            one.close()
