"""What tests of a running application share: its key, what it answers, what it logs and counts."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from hydra_core.base import Base
from hydra_core.decoding import naive_generate
from hydra_core.sampling import Request
from pipelines.serve.replica_states import together

KEY = "a-key-of-this-test-0123456789"
MODEL = "hydra-heads"
LONG = {"model": MODEL, "prompt": "hello", "max_tokens": 200, "temperature": 1.0, "seed": 3}
REJECTED = "ray_hydra_heads_rejected_total"
OF_FOLLOWERS = {"ray_hydra_registry_answers", "ray_hydra_registry_changes_total", "ray_hydra_recorded_answers_total",
                "ray_hydra_acceptance_drift", "ray_hydra_acceptance_hour", "ray_hydra_acceptance_low"}
UNSEEN = {REJECTED, "ray_hydra_engine_failures_total", "ray_hydra_engine_restarts_total", *OF_FOLLOWERS}
"""What is not told until it happens; or by an endpoint that records nothing, follows no registry, whose heads have no bench."""


def expected(base: Base, prompt: str, tokens: int, **settings: Any) -> str:
    ids = tuple(base.tokenizer(prompt).input_ids)
    return base.decode(naive_generate(base, Request("x", ids, tokens, **settings)).token_ids)


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 180  # a new replica takes more than half a minute on a slow machine
    while not true():
        if time.monotonic() > end:
            pytest.fail(what)
        time.sleep(0.1)


def load_now() -> dict[str, Any]:
    """What the replicas do at this moment, told by themselves: `/ready` is a second old. They must not be full."""
    return together(serve.get_deployment_handle("DecodeServer", MODEL).broadcast("info").results(timeout_s=60))


def log_lines() -> list[dict[str, Any]]:
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    return [json.loads(line) for path in folder.glob("replica_hydra-heads_*.log") for line in path.read_text().splitlines()]


def scraped(names: set[str]) -> None:
    """Wait until Ray's exporter tells every one of `names`, whole."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    absent = names
    for _ in range(60):
        told = {re.split(r"[{ ]", line, maxsplit=1)[0] for line in httpx.get(address, timeout=60).text.splitlines()}
        if not (absent := names - told):
            return
        time.sleep(0.5)
    pytest.fail(f"not told: {sorted(absent)}")
