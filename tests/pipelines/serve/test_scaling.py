"""Another replica while answers wait for a row, on a real Serve, with the same answers from each."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from hydra_core.base import Base
from hydra_core.decoding import naive_generate
from hydra_core.sampling import Request
from pipelines.config import load_config
from pipelines.serve.stage import start_app
from tests.pipelines.serve.test_stage import free_port

pytestmark = pytest.mark.slow
CLIENTS, TOKENS, ROWS = 12, 150, 2


def test_a_second_replica_comes_while_rows_are_short(local_ray: None, tiny_base_dir: Path, tiny_base: Base,
                                                     storage: Path) -> None:
    app = start_app(load_config(None, {
        "storage": str(storage), "base.model": str(tiny_base_dir), "base.dtype": "fp32", "serve.model": "plain",
        "serve.port": free_port(), "serve.max_batch_size": ROWS, "serve.max_replicas": 2, "serve.workers.cpus": 0.25,
        "serve.workers.threads": 1}))
    enough, answers = threading.Event(), dict[int, set[str]]()

    def ask(client: int) -> None:
        with httpx.Client(base_url=app.url, timeout=120) as http:
            while not enough.is_set():
                answer = http.post("/v1/completions", json={
                    "model": "hydra-heads", "prompt": "abc", "max_tokens": TOKENS, "temperature": 1.0, "seed": client})
                assert answer.status_code == 200, answer.text
                answers.setdefault(client, set()).add(answer.json()["choices"][0]["text"])

    def front(name: str) -> int:
        found: dict[str, Any] = httpx.get(f"{app.url}/ready", timeout=30).json()
        return int(found.get(name, 0))

    def wait_for(name: str, least: int) -> None:
        until = time.monotonic() + 240
        while front(name) < least:
            assert time.monotonic() < until, f"{name} stays below {least}"
            time.sleep(0.2)

    try:
        assert front("replicas") == 1
        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(ask, client) for client in range(CLIENTS)]
            try:
                wait_for("replicas", 2)
                wait_for("running", ROWS + 1)  # more than one replica has rows for: the second one answers
            finally:
                enough.set()
            for one in asking:
                one.result()
    finally:
        app.stop()
    ids = tuple(tiny_base.tokenizer("abc").input_ids)
    for client, texts in answers.items():
        alone = naive_generate(tiny_base, Request("x", ids, TOKENS, temperature=1.0, seed=client))
        assert texts == {tiny_base.decode(alone.token_ids)}
