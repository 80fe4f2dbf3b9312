"""`bench`: plain decoding, transformers, n-gram lookup, every trained drafter and others on the same prompts in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray

from pipelines.bench.concurrency import read_concurrency, summarise_concurrency
from pipelines.bench.concurrency_report import (
    concurrency_markdown,
    concurrency_metrics,
    concurrency_table,
    plot_concurrency,
)
from pipelines.bench.inputs import bench_fingerprint, check_contenders, find_heads, find_methods, input_digests
from pipelines.bench.latency import measure
from pipelines.bench.losslessness import read_losslessness
from pipelines.bench.memory import memory_markdown, read_memory
from pipelines.bench.plan import COMBINED, BenchPlan, read_rows, split_sweep
from pipelines.bench.plots import draw
from pipelines.bench.questions import load_questions
from pipelines.bench.report import (
    batch_markdown,
    category_markdown,
    category_table,
    markdown,
    method_table,
    metrics_of,
    summarise,
)
from pipelines.bench.results import bench_label, claimed_result, result_folder
from pipelines.bench.step_breakdown import step_table, steps_markdown
from pipelines.bench.throughput import read_batches, summarise_batches
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths, StageResult, finished
from pipelines.runtime.files import write_text
from pipelines.runtime.ray_cluster import ensure_ray, measuring_resources
from pipelines.serve.stage import resolve_args
from pipelines.tracking import Tracker

ERRORS = "errors.jsonl"
MEMORY = "memory.json"


def run_bench(config: RunConfig) -> StageResult:
    """Run the stage, or continue a stopped run. Raises InputError for the user's mistakes.

    A bench of other prompts or settings has a folder of its own beside the first one, see `results`.
    """
    known = find_heads(config)
    methods = find_methods(config, known)
    asked = {split_sweep(method, known)[0] for method in methods}
    heads = known if COMBINED in methods else {name: folder for name, folder in known.items() if name in asked}
    tracker = Tracker.open(config)
    wanted = bench_fingerprint(config, known)
    root, label = RunPaths.of(config).stage("bench"), bench_label(config)
    for one in dict.fromkeys((wanted, bench_fingerprint(config, known, config.base.device))):
        if (done := finished(result_folder(root, one, label), one)) is not None:
            return done
    check_contenders(config, methods, heads)
    questions, errors = load_questions(config)
    with (claimed_result(config, "bench", root, wanted, label) as stage, ensure_ray(config),
          tracker.start("bench", fingerprint=wanted) as run):
        folder = stage.folder
        plan = _plan(config, folder, methods, heads)
        for name, (digest, where) in input_digests(config, heads).items():
            run.log_dataset(name, digest, where, "bench")
        task = ray.remote(measure).options(**measuring_resources(config))
        ray.get(task.remote(plan, questions))
        write_text(folder / ERRORS, "".join(json.dumps(error) + "\n" for error in errors))
        figures = summarise(read_rows(Path(plan.rows_file)), read_losslessness(Path(plan.losslessness_file)))
        batches = summarise_batches(read_batches(Path(plan.batch_file)))
        load = summarise_concurrency(read_concurrency(Path(plan.concurrency_file)))
        files = _write_report(config, folder, figures, batches, load, plan)
        run.log_metrics(concurrency_metrics(load))
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
        losslessness_file=str(folder / "identity.jsonl"), batch_file=str(folder / "batch.jsonl"),
        concurrency_file=str(folder / "load.jsonl"), memory_file=str(folder / MEMORY), methods=methods, heads=heads,
        ngram=(ngram.max_match, ngram.min_match, ngram.length), max_new_tokens=bench.max_new_tokens, rounds=bench.rounds,
        turns=bench.turns, single=bench.single,
        identity_prompts=0 if bench.temperature else bench.identity_prompts, identity_batch=bench.identity_batch,
        identity_formats=bench.identity_formats,
        batch_prompts=bench.batch_prompts, max_batch_size=bench.max_batch_size,
        batch_limits=bench.batch_limits, batch_app=resolve_args(config) if bench.batch_job else None,
        concurrency=bench.concurrency, concurrency_requests=bench.concurrency_requests, temperature=bench.temperature,
        shared_noise=bench.shared_noise, threads=bench.threads)


def _write_report(config: RunConfig, folder: Path, figures: dict[str, Any], batches: dict[str, Any],
                  load: dict[str, Any], plan: BenchPlan) -> list[Path]:
    how = f"temperature {plan.temperature:g}" if plan.temperature else "greedy"
    title = f"{config.name}: {config.bench.max_new_tokens} new tokens at most, {how}, one request at a time"
    memory = read_memory(folder / MEMORY)
    report = {"methods": figures, "memory": memory, "batch": batches, "load": load, "plan": plan.to_json()}
    write_text(folder / "report.json", json.dumps(report, indent=2))
    write_text(folder / "report.md", markdown(figures, title, config.base.dtype) + category_markdown(figures)
               + steps_markdown(figures) + memory_markdown(memory) + batch_markdown(batches, plan) + concurrency_markdown(load))
    plots = draw(figures, folder)
    for table in (method_table(figures, title, config.base.dtype), category_table(figures), step_table(figures),
                  concurrency_table(load)):
        if table.rows:
            table.show()
    if load:
        plot_concurrency(load, folder / "load.png")
    written = ("rows.jsonl", ERRORS, "identity.jsonl", "batch.jsonl", "load.jsonl", MEMORY, "report.json", "report.md",
               "load.png")
    return [folder / name for name in written if (folder / name).exists()] + plots
