"""The whole chain on an S3 bucket as its storage: killed, run again, meddled with, and read from there by other commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import Base, load_vocabulary
from hydra_core.decoding import load_heads, naive_generate, read_configuration
from hydra_core.files import atomic_file
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.sampling import Request
from hydra_core.storage import as_path, listing
from jobs.runner import run
from pipelines.batch.writer import read_batch_rows
from pipelines.bench.plan import read_rows
from pipelines.rows.parquet_parts import number_of_rows, read_parts
from pipelines.rows.schemas import FEATURES, PROMPTS, RESPONSES
from pipelines.runtime.artifacts import read_manifest
from tests.pipelines.distill.test_stage import write_prompts
from tests.pipelines.serve.test_stage import free_port

pytestmark = [pytest.mark.slow, pytest.mark.drawn, pytest.mark.timeout(900)]


class Chain:
    """The quickstart as a command with all of its data in a bucket, and one drafter."""

    def __init__(self, s3: str, tmp_path: Path, base_dir: Path, environment: dict[str, str]) -> None:
        self.folder, self.database = as_path(f"{s3}/storage/runs/tiny"), f"sqlite:///{tmp_path}/mlflow.db"
        self.told = tmp_path / "told.txt"
        prompts = write_prompts(tmp_path / "p.jsonl", 30)
        with atomic_file(as_path(f"{s3}/in/p.jsonl")) as path:
            path.write_bytes(prompts.read_bytes())
        self.environment = {**os.environ, **environment, "MLFLOW_TRACKING_URI": self.database}
        self.settings = [
            f"storage={s3}/storage", "name=tiny", f"base.model={base_dir}", "base.dtype=fp32", "prompts.source=jsonl",
            f"prompts.path={s3}/in/p.jsonl", "distill.max_new_tokens=16", "distill.held_out=0.4", "distill.workers.threads=1",
            "distill.feature_dtype=fp32", "distill.rows_per_file=8", "train.only=hydra", "train.max_steps=8",
            "train.validate_every=2", "train.validation_rows=8", "tree.batch_sizes=[1]", "tree.node_counts=[1, 2, 4]",
            "tree.context=16", "tree.repeats=3", "tree.threads=1", "tree.max_rows=8", "bench.limit=3", "bench.max_new_tokens=8",
            "bench.identity_prompts=2", "bench.batch_prompts=0", "bench.methods=[plain, hydra]", "bench.threads=1",
            "bench.rounds=1", "promote.min_gain=0.01", "batch.limit=6", "batch.max_new_tokens=8", "batch.rows_per_file=2",
            "serve.workers.threads=1", f"serve.port={free_port()}"]
        self.command = [sys.executable, "-m", "jobs.quickstart", *self.settings]

    def run(self) -> tuple[dict[str, Any], str]:
        """The JSON line and stderr of a run that must succeed."""
        done = subprocess.run(self.command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(done.stdout), done.stderr

    def killed_once(self, path: Path) -> None:
        """Run until `path` is there, then die without a word."""
        with self.told.open("w", encoding="utf-8") as told:
            process = subprocess.Popen(self.command, env=self.environment, start_new_session=True, stdout=told, stderr=told)
        deadline = time.monotonic() + 300
        while not listing(path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert listing(path) and process.poll() is None, self.told.read_text(encoding="utf-8")[-6000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def finished(self) -> set[str]:
        """Stages with a manifest."""
        return {name.removesuffix("/manifest.json") for name in listing(self.folder) if name.endswith("manifest.json")}


def test_the_chain(s3: str, tmp_path: Path, tiny_base_dir: Path, tiny_base: Base, worker_env: dict[str, str],
                   monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(s3, tmp_path, tiny_base_dir, worker_env)
    chain.killed_once(chain.folder / "train" / "hydra" / "state")  # after a checkpoint, or in the middle of one
    assert chain.finished() == {"distill"}
    part = next(name for name in listing(chain.folder / "distill") if name.startswith("responses/"))
    (chain.folder / "distill" / part).unlink()
    result, _ = chain.run()
    assert chain.finished() == {"distill", "train/hydra", "tree/hydra", "bench", "promote", "batch"}
    manifest = read_manifest(chain.folder / "distill")
    assert manifest is not None and all(entry["bytes"] and entry["tag"] for entry in manifest["files"].values())
    made = manifest["result"]["figures"]
    assert 0 < made["resumed"] < made["responses"] == 60, "only the answers of that part are made again"
    check_rows_and_heads(chain, tiny_base, tiny_base_dir)
    assert result["champion"] in ("plain", "hydra")
    assert not [name for name in listing(chain.folder) if ".lock/" in name or "/state/" in name or ".probe" in name]
    assert not (tmp_path / "storage").exists() and not list(Path.cwd().glob("s3:*"))

    monkeypatch.setenv("MLFLOW_TRACKING_URI", chain.database)
    for model in (f"{chain.folder}/tree/hydra/heads", "models:/hydra-heads@champion"):  # which lies in the bucket too
        assert run("generate", [*chain.settings[:4], f"generate.model={model}", "generate.max_new_tokens=4", "hello"]) == 0


def check_rows_and_heads(chain: Chain, base: Base, base_dir: Path) -> None:
    distill, batch = chain.folder / "distill", chain.folder / "batch"
    assert number_of_rows(distill / "prompts", PROMPTS) == 30 and number_of_rows(distill / "features", FEATURES) == 60
    assert number_of_rows(distill / "responses", RESPONSES) == 60
    vocabulary = load_vocabulary(str(base_dir), dtype="fp32", cache=base_dir.parent / "cache")
    assert load_checkpoint(chain.folder / "tree" / "hydra" / "heads", vocabulary).trees.trees.keys() == {1}
    assert load_heads(f"{chain.folder}/tree/hydra/heads", base)[0] is not None
    assert read_configuration(chain.folder / "promote" / "configuration").name in ("plain", "hydra")
    questions = {row["prompt_id"]: row for row in read_parts(distill / "prompts", PROMPTS).to_pylist()}
    timed = read_rows(chain.folder / "bench" / "rows.jsonl")
    assert len(timed) == 6
    for row in timed:
        wanted = naive_generate(base, Request("x", tuple(questions[row.question]["prompt_ids"]), 8))
        assert row.token_ids == wanted.token_ids
    assert len(list(read_batch_rows(batch / "rows", "parquet"))) == 6 and (batch / "_SUCCESS").exists()
