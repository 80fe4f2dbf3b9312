"""`bench`: plain decoding, transformers, n-gram lookup, every trained drafter and others on the same prompts in one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray

from hydra_core.base import load_vocabulary, resolve_base
from hydra_core.bundled import BUNDLED
from hydra_core.decoding import check_heads
from hydra_core.errors import InputError
from pipelines.bench.concurrency import read_load, summarise_load
from pipelines.bench.concurrency_report import load_markdown, load_metrics, plot_load, print_load
from pipelines.bench.latency import measure
from pipelines.bench.llama_cpp import check_llama
from pipelines.bench.losslessness import read_identity
from pipelines.bench.memory import memory_markdown, read_memory
from pipelines.bench.plan import (
    COMBINED,
    LLAMA,
    LOOKUP,
    NGRAM,
    PLAIN,
    SWEEP,
    TRANSFORMERS,
    BenchPlan,
    own_heads,
    read_rows,
    split_sweep,
    sweep_tree,
)
from pipelines.bench.plots import draw
from pipelines.bench.questions import load_questions
from pipelines.bench.report import (
    batch_markdown,
    category_markdown,
    markdown,
    metrics_of,
    print_categories,
    print_table,
    summarise,
)
from pipelines.bench.step_breakdown import print_steps, steps_markdown
from pipelines.bench.throughput import read_batches, summarise_batches
from pipelines.config import RunConfig
from pipelines.rows.schemas import content_id
from pipelines.runtime.artifacts import (
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
from pipelines.runtime.ray_cluster import ensure_ray, measuring_resources
from pipelines.serve.model_identity import serving_of
from pipelines.serve.stage import find_args, resolve_args
from pipelines.tracking import Tracker
from pipelines.tracking.lookup import bundled_heads

ERRORS = "errors.jsonl"
MEMORY = "memory.json"
HEADS_FILES = ("model.safetensors", "tree.json")


def run_bench(config: RunConfig) -> StageResult:
    """Run the stage, or go on where a stopped one was. Raises InputError for the user's mistakes."""
    paths = RunPaths.of(config)
    known = find_heads(config)
    methods = _methods(config, known)
    asked = {split_sweep(method, known)[0] for method in methods}
    heads = known if COMBINED in methods else {name: folder for name, folder in known.items() if name in asked}
    tracker = Tracker.open(config)
    folder, wanted = paths.stage("bench"), bench_fingerprint(config, known)
    if (done := finished(folder, wanted)) is not None:
        return done
    _check(config, methods, heads)
    questions, errors = load_questions(config)
    plan = _plan(config, folder, methods, heads)
    with (stage_folder(config, "bench", folder, wanted) as stage, ensure_ray(config),
          tracker.start("bench", fingerprint=wanted) as run):
        for name, (digest, where) in _inputs(config, heads).items():
            run.log_dataset(name, digest, where, "bench")
        task = ray.remote(measure).options(**measuring_resources(config))
        ray.get(task.remote(plan, questions))
        write_text(folder / ERRORS, "".join(json.dumps(error) + "\n" for error in errors))
        figures = summarise(read_rows(Path(plan.rows_file)), read_identity(Path(plan.identity_file)))
        batches = summarise_batches(read_batches(Path(plan.batch_file)))
        load = summarise_load(read_load(Path(plan.load_file)))
        files = _write_report(config, folder, figures, batches, load, plan)
        run.log_metrics(load_metrics(load))
        memory = {name: value for name, value in read_memory(Path(plan.memory_file)).items() if isinstance(value, int)}
        run.log_metrics(metrics_of(figures) | memory)
        for path in files:
            run.log_artifact(path)
        return stage.finish(StageResult("bench", run.run_id, {"report": str(folder / "report.json")}, {
            "questions": len(questions), "errors": len(errors), "methods": figures,
            **({"batch": batches} if batches else {}), **({"load": load} if load else {})}), files)


def _plan(config: RunConfig, folder: Path, methods: tuple[str, ...], heads: dict[str, str]) -> BenchPlan:
    bench, ngram = config.bench, config.ngram
    return BenchPlan(
        base=config.base, cache=str(RunPaths.of(config).cache), rows_file=str(folder / "rows.jsonl"),
        identity_file=str(folder / "identity.jsonl"), batch_file=str(folder / "batch.jsonl"),
        load_file=str(folder / "load.jsonl"), memory_file=str(folder / MEMORY), methods=methods, heads=heads,
        ngram=(ngram.max_match, ngram.min_match, ngram.length), max_new_tokens=bench.max_new_tokens, rounds=bench.rounds,
        turns=bench.turns, single=bench.single,
        identity_prompts=0 if bench.temperature else bench.identity_prompts, identity_batch=bench.identity_batch,
        identity_formats=bench.identity_formats,
        batch_prompts=bench.batch_prompts, max_batch_size=bench.max_batch_size,
        batch_limits=bench.batch_limits, batch_app=resolve_args(config) if bench.batch_job else None,
        concurrency=bench.concurrency, concurrency_requests=bench.concurrency_requests, temperature=bench.temperature,
        shared_noise=bench.shared_noise, threads=bench.threads)


def bench_fingerprint(config: RunConfig, heads: dict[str, str]) -> str:
    """What a `bench` folder is the answer to: settings, prompts and the very heads. Raises InputError for missing files."""
    resolved = resolve_base(config.base.model, RunPaths.of(config).cache)
    upstream = {"base": resolved.digest}
    for name, folder in heads.items():
        upstream |= {f"{name}/{file}": _digest(Path(folder) / file) for file in HEADS_FILES}
        if any(split_sweep(method, heads)[0] == name != method for method in config.bench.methods):
            upstream[f"{name}/{SWEEP}"] = _digest(Path(folder) / SWEEP)
    if config.bench.prompts:
        path = Path(config.bench.prompts)
        if not path.is_file():
            raise InputError(f"bench.prompts={path}: no such file")
        upstream["prompts"] = file_digest(path)
    elif (manifest := read_manifest(RunPaths.of(config).stage("distill"))) is not None:
        upstream["prompts"] = manifest["fingerprint"]
    if config.bench.batch_job:
        upstream["batch"] = str(serving_of(find_args(config)))
    settings = {"bench": config.bench.model_dump(), "ngram": config.ngram.model_dump(),
                "base": config.base.model_dump(exclude={"model"})}
    return fingerprint("bench", settings, upstream)


def _digest(path: Path) -> str:
    if not path.is_file():
        again = ": run `hydra-heads tree` again" if path.name == SWEEP else ""
        raise InputError(f"bench.heads={path.parent}: is no whole heads checkpoint: {path.name} is missing{again}")
    return file_digest(path)


def _check(config: RunConfig, methods: tuple[str, ...], heads: dict[str, str]) -> None:
    """Raise InputError unless llama.cpp is there where it is asked for, and every checkpoint loads on this base: told before
    anything runs, not in the middle."""
    if LLAMA in methods:
        check_llama(config.base.model)
    for name, nodes in (split_sweep(method, heads) for method in methods):
        if nodes is not None:
            sweep_tree(Path(heads[name]), nodes)
    if not heads:
        return
    vocabulary = load_vocabulary(config.base.model, dtype=config.base.dtype, cache=RunPaths.of(config).cache)
    for folder in heads.values():
        try:
            check_heads(folder, vocabulary)
        except InputError as error:
            raise InputError(f"bench.heads: {error}") from None


def _inputs(config: RunConfig, heads: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Name -> digest and place of everything that is read."""
    distilled = RunPaths.of(config).stage("distill")
    if config.bench.prompts:
        found = {"prompts": (file_digest(Path(config.bench.prompts)), config.bench.prompts)}
    else:
        found = {"prompts": (str(require_manifest(distilled, "distill")["fingerprint"]), str(distilled / "prompts"))}
    return found | {f"{name} heads": (content_id(*(file_digest(Path(folder) / file) for file in HEADS_FILES)), folder)
                    for name, folder in heads.items()}


def find_heads(config: RunConfig) -> dict[str, str]:
    """Drafter name -> checkpoint folder: `bench.heads`, else what `tree` (or `train`) left in this run; and `shipped` where
    heads for this base come with the package."""
    packaged = bundled_heads(config)
    last = {} if packaged is None else {BUNDLED: packaged}
    if config.bench.heads:
        folder = Path(packaged) if config.bench.heads == BUNDLED and packaged else Path(config.bench.heads)
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["heads"]["kind"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"bench.heads={folder}: is not a heads checkpoint (no readable config.json)") from None
        return {str(kind): str(folder)} | ({} if str(folder) == packaged else last)
    found = {}
    for name in config.train.drafters:
        for stage in ("tree", "train"):
            folder = RunPaths.of(config).stage(stage, name)
            if read_manifest(folder) is not None and (folder / "heads").is_dir():
                found[name] = str(folder / "heads")
                break
    return found | last


def _methods(config: RunConfig, heads: dict[str, str]) -> tuple[str, ...]:
    theirs, llama = ((), ()) if config.bench.temperature else ((TRANSFORMERS, LOOKUP), (LLAMA,))
    known = (PLAIN, *theirs, NGRAM, *heads, *((COMBINED,) if own_heads(heads) else ()), *llama)
    asked = config.bench.methods or tuple(method for method in known if method not in (LOOKUP, LLAMA))
    for method in asked:
        if method not in known and split_sweep(method, heads)[0] not in heads:
            raise InputError(f"bench.methods: {method!r} is none of {', '.join(known)} (heads must be trained first), "
                             "nor NAME@N of a trained drafter NAME and a number of nodes N")
    return tuple(dict.fromkeys((PLAIN, *asked)))


def _write_report(config: RunConfig, folder: Path, figures: dict[str, Any], batches: dict[str, Any],
                  load: dict[str, Any], plan: BenchPlan) -> list[Path]:
    how = f"temperature {plan.temperature:g}" if plan.temperature else "greedy"
    title = f"{config.name}: {config.bench.max_new_tokens} new tokens at most, {how}, one request at a time"
    memory = read_memory(folder / MEMORY)
    report = {"methods": figures, "memory": memory, "batch": batches, "load": load, "plan": plan.to_json()}
    write_text(folder / "report.json", json.dumps(report, indent=2))
    write_text(folder / "report.md", markdown(figures, title, config.base.dtype) + category_markdown(figures)
               + steps_markdown(figures) + memory_markdown(memory) + batch_markdown(batches, plan) + load_markdown(load))
    plots = draw(figures, folder)
    print_table(figures, title, config.base.dtype, sys.stderr)
    print_categories(figures, sys.stderr)
    print_steps(figures, sys.stderr)
    print_load(load, sys.stderr)
    if load:
        plot_load(load, folder / "load.png")
    written = ("rows.jsonl", ERRORS, "identity.jsonl", "batch.jsonl", "load.jsonl", MEMORY, "report.json", "report.md",
               "load.png")
    return [folder / name for name in written if (folder / name).exists()] + plots
