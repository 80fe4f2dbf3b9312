"""The whole chain on a tiny base: every stage real, then again to see that nothing is done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hydra_core.base import Base, load_vocabulary
from hydra_core.checkpoint import load_checkpoint
from hydra_core.decoding import Request, naive_generate
from pipelines.batch_worker import read_batch_rows
from pipelines.bench_plan import read_rows
from pipelines.contracts import PROMPTS
from pipelines.parts import read_parts
from tests.pipelines.test_distill import write_prompts
from tests.pipelines.test_serve import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(arguments: list[str], environment: dict[str, str]) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-m", "jobs.quickstart", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_quickstart(tiny_base_dir: Path, tiny_base: Base, storage: Path, worker_env: dict[str, str]) -> None:
    prompts = write_prompts(storage.parent / "p.jsonl", 60)
    arguments = [f"storage={storage}", "name=tiny", f"base.model={tiny_base_dir}", "base.dtype=fp32", "prompts.source=jsonl",
                 f"prompts.path={prompts}", "prompts.count=60", "distill.max_new_tokens=24", "distill.held_out=0.4",
                 "distill.workers.threads=1", "distill.feature_dtype=fp32", "train.max_steps=12", "train.validate_every=6",
                 "train.validation_rows=8", "tree.batch_sizes=[1, 4]", "tree.node_counts=[1, 2, 4, 8]", "tree.context=16",
                 "tree.repeats=3", "tree.threads=1", "tree.max_rows=16", "bench.limit=4", "bench.max_new_tokens=16",
                 "bench.identity_prompts=4", "bench.threads=1", "batch.limit=10", "batch.max_new_tokens=8",
                 f"serve.port={free_port()}", "serve.workers.threads=1"]
    environment = {**os.environ, **worker_env, "MLFLOW_TRACKING_URI": ""}
    result = run(arguments, environment)
    figures = result["figures"]
    assert isinstance(figures, dict)
    methods = figures["methods"]
    assert set(methods) == {"plain", "transformers", "ngram", "medusa", "hydra", "hydra++"}
    for name, values in methods.items():
        assert values["rows"] == 4 and values["identical"] == 1.0, name  # fp32: nothing may differ
        assert name == "transformers" or values["fp32"] == {"answers": 8, "identical": 8, "near_tie": 0, "different": 0}
    assert methods["plain"]["tokens_per_step"] == 1.0 and figures["champion"] in methods

    folder = storage / "runs" / "tiny"
    for row in read_rows(folder / "bench" / "rows.jsonl"):
        question = next(r for r in read_parts(folder / "distill" / "prompts", PROMPTS).to_pylist()
                        if r["prompt_id"] == row.question)
        assert question["split"] == "held_out"
        assert row.token_ids == naive_generate(tiny_base, Request("x", tuple(question["prompt_ids"]), 16)).token_ids
    vocabulary = load_vocabulary(str(tiny_base_dir), dtype="fp32", cache=storage / "cache")
    for name in ("medusa", "hydra", "hydra++"):
        trees = load_checkpoint(folder / "tree" / name / "heads", vocabulary).trees
        assert sorted(trees.trees) == [1, 4]
    answers = list(read_batch_rows(folder / "batch" / "rows", "parquet"))
    assert len(answers) == 10 and all(len(row["token_ids"]) <= 8 for row in answers)

    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    assert len(stamps) == 1 + 3 + 3 + 1 + 1 + 1
    again = run(arguments, environment)
    assert again["skipped"] is True and again["figures"]["champion"] == figures["champion"]  # type: ignore[index]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")} == stamps
