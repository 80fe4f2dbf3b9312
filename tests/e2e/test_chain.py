"""The whole chain on a tiny base: every stage real, killed, run again, meddled with, and served by the command it prints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from hydra_core.base import Base, load_vocabulary
from hydra_core.decoding import naive_generate
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.sampling import Request
from pipelines.batch.writer import read_batch_rows
from pipelines.bench.plan import read_rows
from pipelines.compare import run_compare
from pipelines.config import load_config
from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.schemas import PROMPTS
from tests.decisions import choose_winner
from tests.pipelines.distill.test_stage import write_prompts
from tests.pipelines.serve.test_stage import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


DRAFTERS = ("medusa", "hydra", "hydra++")


class Chain:
    """The quickstart as a command, and what it has left."""

    def __init__(self, storage: Path, base_dir: Path, environment: dict[str, str]) -> None:
        prompts = write_prompts(storage.parent / "p.jsonl", 60)
        self.folder, self.port = storage / "runs" / "tiny", free_port()
        self.environment = {**os.environ, **environment, "MLFLOW_TRACKING_URI": ""}
        self.command = [
            sys.executable, "-m", "jobs.quickstart", f"storage={storage}", "name=tiny", f"base.model={base_dir}",
            "base.dtype=fp32", "prompts.source=jsonl", f"prompts.path={prompts}", "prompts.count=60",
            "distill.max_new_tokens=24", "distill.held_out=0.4", "distill.workers.threads=1", "distill.feature_dtype=fp32",
            "train.max_steps=12", "train.validate_every=6", "train.validation_rows=8", "tree.batch_sizes=[1, 4]",
            "tree.node_counts=[1, 2, 4, 8]", "tree.context=16", "tree.repeats=3", "tree.threads=1", "tree.max_rows=16",
            "bench.limit=4", "bench.max_new_tokens=16", "bench.identity_prompts=4", "bench.threads=1", "batch.limit=10",
            "batch.max_new_tokens=8", f"serve.port={self.port}", "serve.workers.threads=1"]

    def run(self) -> tuple[dict[str, Any], str]:
        """The JSON line and stderr of a run that must succeed."""
        done = subprocess.run(self.command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("\n") == 1
        return json.loads(done.stdout), done.stderr

    def killed_once(self, path: Path) -> None:
        """Run until `path` is there, then die without a word."""
        process = subprocess.Popen(self.command, env=self.environment, start_new_session=True, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 400
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert path.exists() and process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stamps(self) -> dict[str, int]:
        """When each finished stage was finished."""
        return {str(path.parent.relative_to(self.folder)): path.stat().st_mtime_ns for path in self.folder.rglob("manifest.json")}


def test_quickstart(tiny_base_dir: Path, tiny_base: Base, storage: Path, worker_env: dict[str, str]) -> None:
    chain = Chain(storage, tiny_base_dir, worker_env)
    chain.killed_once(chain.folder / "train" / "hydra" / "state")  # in the middle of `train`
    before = chain.stamps()
    assert set(before) == {"distill", "train/medusa"}
    result, told = chain.run()
    after = chain.stamps()
    assert before.items() <= after.items(), "what had been finished is not done again"
    parts = {f"{stage}/{name}" for stage in ("train", "tree") for name in DRAFTERS}
    assert set(after) == {"distill", "bench", "promote", "batch"} | parts
    check_results(result, chain.folder, storage, tiny_base, tiny_base_dir)
    client = MlflowClient(f"sqlite:///{storage}/mlflow/mlflow.db")
    assert client.get_run(result["run_id"]).info.status == "FINISHED"

    again, _ = chain.run()
    assert again["skipped"] is True and again["champion"] == result["champion"] and chain.stamps() == after

    part = next((chain.folder / "distill" / "responses").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")  # the rows are made again and are the same: nobody else need be
    report = chain.folder / "bench" / "report.json"
    report.write_text(report.read_text(encoding="utf-8").replace('"rows": 4', '"rows": 5'), encoding="utf-8")
    chain.run()
    mended = chain.stamps()
    assert {name for name, stamp in mended.items() if stamp != after[name]} == {"distill", "bench", "promote", "batch"}
    assert '"rows": 4' in report.read_text(encoding="utf-8")
    check_compare(client, result["run_id"], storage)
    check_serve_command(told, chain)


def check_results(result: dict[str, Any], folder: Path, storage: Path, base: Base, base_dir: Path) -> None:
    methods = result["methods"]
    assert set(methods) == {"plain", "transformers", "ngram", *DRAFTERS, "combined"}
    for name, values in methods.items():
        assert values["rows"] == 4 and values["identical"] == 1.0, name  # fp32: nothing may differ
        assert name == "transformers" or values["fp32"] == {"answers": 8, "identical": 8, "near_tie": 0, "different": 0}
    assert methods["plain"]["tokens_per_step"] == 1.0 and result["champion"] == choose_winner(methods, 1.0)[0]
    for row in read_rows(folder / "bench" / "rows.jsonl"):
        question = next(r for r in read_parts(folder / "distill" / "prompts", PROMPTS).to_pylist()
                        if r["prompt_id"] == row.question)
        assert question["split"] == "held_out"
        assert row.token_ids == naive_generate(base, Request("x", tuple(question["prompt_ids"]), 16)).token_ids
    vocabulary = load_vocabulary(str(base_dir), dtype="fp32", cache=storage / "cache")
    for name in DRAFTERS:
        assert sorted(load_checkpoint(folder / "tree" / name / "heads", vocabulary).trees.trees) == [1, 4]
    answers = list(read_batch_rows(folder / "batch" / "rows", "parquet"))
    assert len(answers) == 10 and all(len(row["token_ids"]) <= 8 for row in answers)


def check_compare(client: MlflowClient, parent: str, storage: Path) -> None:
    """Two benches of the chain, and two trainings: everything that led to them is found, and what differs."""
    runs = client.search_runs([client.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    ids: dict[str, list[str]] = {}
    for run in (run for run in runs if run.info.status == "FINISHED"):
        stage, part = (run.data.tags[f"hydra_heads.{name}"] for name in ("stage", "part"))
        ids.setdefault(f"{stage} {part}", []).append(run.info.run_id)
    found = {}
    for name, asked in {"bench": ids["bench -"][:2], "train": [ids["train medusa"][0], ids["train hydra"][0]]}.items():
        result = run_compare(load_config(None, {"storage": str(storage), "compare.runs": asked,
                                                "tracking.uri": f"sqlite:///{storage}/mlflow/mlflow.db"}))
        found[name] = json.loads(Path(result.outputs["data"]).read_text(encoding="utf-8")) | result.figures
        assert set(result.figures["linked_from"]) == {parent}
    bench, train = found["bench"], found["train"]
    assert {one["stage"] for one in bench["costs"]} == {"distill", "bench", *(f"{stage} {name}" for stage in ("train", "tree")
                                                                                for name in DRAFTERS)}
    assert bench["differences"] == {} and {one["drafter"] for one in bench["curves"]} == set(DRAFTERS)
    for curve in (*bench["curves"], *train["curves"]):
        assert len(curve["tokens"]) == 12 and len(curve["held_out"]) == 2 and curve["device_seconds"][-1] > 0
    steps = {row["method"]: {one["tokens_per_step"] for one in row["results"]} for row in bench["methods"]}
    assert set(steps) == {"plain", "transformers", "ngram", *DRAFTERS, "combined"} and len(steps["hydra++"]) == 1
    assert train["differences"] == {"train": {"train.drafters.DRAFTER.kind": ["medusa", "hydra"]}}


def check_serve_command(told: str, chain: Chain) -> None:
    """The closing summary's last line, run as it stands."""
    command = next(line for line in told.splitlines() if line.startswith("serve it:")).removeprefix("serve it:")
    process = subprocess.Popen(shlex.split(command), env=chain.environment, cwd="/", stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        heard = []
        for line in process.stderr:
            heard.append(line)
            if "answers at" in line:
                break
        assert heard and "answers at" in heard[-1], "".join(heard[-20:])
        assert httpx.get(f"http://127.0.0.1:{chain.port}/health").status_code == 200
    finally:
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 0, told[-2000:]
