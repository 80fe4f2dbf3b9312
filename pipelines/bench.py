"""`bench`: plain decoding, transformers, n-gram lookup and every trained drafter on the same prompts in one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray

from hydra_core.base import context_limit, load_tokenizer, resolve_base
from hydra_core.errors import InputError
from pipelines.bench_batch import read_batches, summarise_batches
from pipelines.bench_identity import read_identity
from pipelines.bench_plan import NGRAM, PLAIN, TRANSFORMERS, BenchPlan, Question, read_rows
from pipelines.bench_report import batch_markdown, markdown, plot, print_table, summarise
from pipelines.bench_run import measure
from pipelines.cluster import ensure_ray, measuring_resources
from pipelines.config import RunConfig
from pipelines.contracts import PROMPTS
from pipelines.parts import read_parts
from pipelines.prompt_files import PromptRow, RowError, read_prompt_rows
from pipelines.prompts import prompt_ids_of
from pipelines.stage import (
    RunPaths,
    StageResult,
    file_digest,
    fingerprint,
    finished,
    read_manifest,
    require_manifest,
    stage_folder,
    write_text,
)
from pipelines.tracking import Tracker

DEFAULT_QUESTIONS = 24


def run_bench(config: RunConfig) -> StageResult:
    """Run the stage, or go on where a stopped one was. Raises InputError for the user's mistakes."""
    paths = RunPaths.of(config)
    heads = find_heads(config)
    plan_methods = _methods(config, heads)
    folder, wanted = paths.stage("bench"), bench_fingerprint(config, heads)
    if (done := finished(folder, wanted)) is not None:
        return done
    questions = load_questions(config)
    plan = _plan(config, folder, plan_methods, {name: heads[name] for name in plan_methods if name in heads})
    with stage_folder(config, "bench", folder, wanted) as stage, ensure_ray(config):
        tracker = Tracker.open(config)
        with tracker.start("bench", params=config.model_dump(mode="json"), fingerprint=wanted) as run:
            task = ray.remote(measure).options(**measuring_resources(config))
            ray.get(task.remote(plan, questions))
            figures = summarise(read_rows(Path(plan.rows_file)), read_identity(Path(plan.identity_file)))
            batches = summarise_batches(read_batches(Path(plan.batch_file)))
            files = _write_report(config, folder, figures, batches, plan)
            result = stage.finish(StageResult("bench", run.run_id, {"report": str(folder / "report.json")}, {
                "questions": len(questions), "methods": figures, **({"batch": batches} if batches else {})}), files)
            for method, values in figures.items():
                run.log_metrics({f"{_metric_name(method)}.{key}": value for key, value in values.items()
                                 if isinstance(value, (int, float))})
            for path in files:
                run.log_artifact(path)
            return result


def _plan(config: RunConfig, folder: Path, methods: tuple[str, ...], heads: dict[str, str]) -> BenchPlan:
    bench, ngram = config.bench, config.ngram
    return BenchPlan(
        base=config.base, cache=str(RunPaths.of(config).cache), rows_file=str(folder / "rows.jsonl"),
        identity_file=str(folder / "identity.jsonl"), batch_file=str(folder / "batch.jsonl"), methods=methods, heads=heads,
        ngram=(ngram.max_match, ngram.min_match, ngram.length), max_new_tokens=bench.max_new_tokens, rounds=bench.rounds,
        identity_prompts=0 if bench.temperature else bench.identity_prompts, identity_batch=bench.identity_batch,
        batch_prompts=bench.batch_prompts, running_batch=bench.running_batch, temperature=bench.temperature,
        shared_noise=bench.shared_noise, threads=bench.threads)


def bench_fingerprint(config: RunConfig, heads: dict[str, str]) -> str:
    """What a `bench` folder is the answer to: settings, prompts and the very heads."""
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    upstream = {"base": resolved.digest}
    for name, folder in heads.items():
        upstream |= {f"{name}/{file}": file_digest(Path(folder) / file) for file in ("model.safetensors", "tree.json")}
    if config.bench.prompts:
        path = Path(config.bench.prompts)
        if not path.is_file():
            raise InputError(f"bench.prompts={path}: no such file")
        upstream["prompts"] = file_digest(path)
    elif (manifest := read_manifest(RunPaths.of(config).stage("distill"))) is not None:
        upstream["prompts"] = manifest["fingerprint"]
    settings = {"bench": config.bench.model_dump(), "ngram": config.ngram.model_dump(),
                "base": config.base.model_dump(exclude={"model"})}
    return fingerprint("bench", settings, upstream)


def find_heads(config: RunConfig) -> dict[str, str]:
    """Drafter name -> checkpoint folder: `bench.heads`, else what `tree` (or `train`) left in this run."""
    if config.bench.heads:
        folder = Path(config.bench.heads)
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["heads"]["kind"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"bench.heads={folder}: is not a heads checkpoint (no readable config.json)") from None
        return {kind: str(folder)}
    found = {}
    for name in config.train.drafters:
        for stage in ("tree", "train"):
            folder = RunPaths.of(config).stage(stage, name)
            if read_manifest(folder) is not None and (folder / "heads").is_dir():
                found[name] = str(folder / "heads")
                break
    return found


def _methods(config: RunConfig, heads: dict[str, str]) -> tuple[str, ...]:
    known = (PLAIN, *(() if config.bench.temperature else (TRANSFORMERS,)), NGRAM, *heads)
    asked = config.bench.methods or known
    for method in asked:
        if method not in known:
            raise InputError(f"bench.methods: {method!r} is none of {', '.join(known)} (heads must be trained first)")
    return tuple(dict.fromkeys((PLAIN, *asked)))


def load_questions(config: RunConfig) -> list[Question]:
    """The prompts to decode: a file, or this run's held-out ones. Raises InputError when there are none."""
    limit = config.bench.limit
    if not config.bench.prompts:
        folder = RunPaths.of(config).stage("distill")
        require_manifest(folder, "distill")
        rows = [row for row in read_parts(folder / "prompts", PROMPTS).to_pylist() if row["split"] == "held_out"]
        rows = sorted(rows, key=lambda row: row["prompt_id"])[:limit or DEFAULT_QUESTIONS]
        if not rows:
            raise InputError("bench.prompts: this run has no held-out prompt: name a JSONL file")
        return [Question(row["prompt_id"], row["source"].split("/")[0], tuple(row["prompt_ids"])) for row in rows]
    cache = RunPaths.of(config).cache
    tokenizer = load_tokenizer(resolve_base(config.base.model, cache).folder)
    longest = context_limit(config.base.model, cache=cache, asked=config.base.context_limit) - 1
    questions = []
    for item in read_prompt_rows(config.bench.prompts, "prompt", limit):
        ids = item if isinstance(item, RowError) else prompt_ids_of(item, tokenizer)
        if not isinstance(ids, RowError) and len(ids) > longest:
            ids = RowError(item.row, f"row {item.row}: prompt: has {len(ids)} tokens, the context has room for {longest}")
        if isinstance(ids, RowError):
            print(f"bench: {config.bench.prompts}: {ids.message}: left out", file=sys.stderr)
            continue
        assert isinstance(item, PromptRow)
        question_id = str(item.extra.get("question_id", item.row))
        if any(question.id == question_id for question in questions):  # results are kept by id
            question_id = f"{question_id}#{item.row}"
        questions.append(Question(question_id, str(item.extra.get("category", "all")), tuple(ids)))
    if not questions:
        raise InputError(f"bench.prompts={config.bench.prompts}: has no usable prompt")
    return questions


def _write_report(config: RunConfig, folder: Path, figures: dict[str, Any], batches: dict[str, Any],
                  plan: BenchPlan) -> list[Path]:
    how = f"temperature {plan.temperature:g}" if plan.temperature else "greedy"
    title = f"{config.name}: {config.bench.max_new_tokens} new tokens at most, {how}, one request at a time"
    report = {"methods": figures, "batch": batches, "plan": plan.to_json()}
    write_text(folder / "report.json", json.dumps(report, indent=2))
    write_text(folder / "report.md", markdown(figures, title, config.base.dtype) + batch_markdown(batches, plan))
    plot(figures, folder / "report.png")
    print_table(figures, title, config.base.dtype, sys.stderr)
    return [folder / name for name in ("rows.jsonl", "identity.jsonl", "batch.jsonl", "report.json", "report.md", "report.png")
            if (folder / name).exists()]


def _metric_name(method: str) -> str:
    """MLflow allows no `+` in a metric's name."""
    return method.replace("++", "_pp")
