"""`bench`: plain decoding, transformers, n-gram lookup, every trained drafter and others on the same prompts in one run."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray

from hydra_core.base import pick_device
from hydra_core.storage import as_path
from pipelines.bench.champion import FIGURE, BenchChampion
from pipelines.bench.concurrency import read_concurrency, summarise_concurrency
from pipelines.bench.concurrency_report import (
    concurrency_markdown,
    concurrency_table,
    plot_concurrency,
)
from pipelines.bench.inputs import (
    bench_fingerprint,
    check_contenders,
    find_heads,
    find_methods,
    input_digests,
    with_champion,
)
from pipelines.bench.latency import measure
from pipelines.bench.losslessness import PROOF, read_losslessness, read_proof
from pipelines.bench.memory import memory_markdown, read_memory
from pipelines.bench.plan import CHAMPION, COMBINED, BenchPlan, Question, heads_name, read_rows
from pipelines.bench.plots import draw
from pipelines.bench.questions import load_questions
from pipelines.bench.recorded import record_bench
from pipelines.bench.report import (
    batch_markdown,
    category_markdown,
    category_table,
    markdown,
    method_table,
    summarise,
)
from pipelines.bench.results import bench_label, claimed_result, done_bench, tell_of_other_machines
from pipelines.bench.step_breakdown import step_table, steps_markdown
from pipelines.bench.throughput import read_batches, summarise_batches
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths, StageResult
from pipelines.runtime.files import write_text
from pipelines.runtime.hardware import timed_on
from pipelines.runtime.measuring import MeasuringPlace, measured_on, measuring_place
from pipelines.runtime.ray_cluster import ensure_ray, measuring_resources
from pipelines.runtime.usage import Meter, Usage
from pipelines.serve.stage import resolve_args
from pipelines.tracking import Tracker, hardware_tags, worker_system_metrics

ERRORS = "errors.jsonl"
MEMORY = "memory.json"


def run_bench(config: RunConfig) -> StageResult:
    """Run the stage, or continue a stopped run. Raises InputError for the user's mistakes.

    A bench of other prompts or settings has a folder of its own beside the first one, see `results`.
    """
    known = find_heads(config)
    methods, champion = with_champion(config, known, find_methods(config, known))
    asked = {heads_name(method, known) for method in methods}
    heads = known if COMBINED in methods else {name: folder for name, folder in known.items() if name in asked}
    tracker = Tracker.open(config)
    timed = champion if champion is not None and champion.method == CHAMPION else None
    request = bench_fingerprint(config, known, champion=timed.digest if timed else None)
    with measuring_place(config) as place:
        if (done := done_bench(config, known, champion, place.hardware.digest)) is not None:
            return done
        check_contenders(config, methods, heads)
        return _measure(config, timed_on(request, place.hardware.digest), methods, heads, champion, tracker, place)


def _measure(config: RunConfig, wanted: str, methods: tuple[str, ...], heads: dict[str, str], champion: BenchChampion | None,
             tracker: Tracker, place: MeasuringPlace) -> StageResult:
    """Measure, on `place`, what the folder with the fingerprint `wanted` lacks, and write the report."""
    timed = champion if champion is not None and champion.method == CHAMPION else None
    questions, errors = load_questions(config)
    tell_of_other_machines(config, wanted, place)
    with (claimed_result(config, "bench", RunPaths.of(config).stage("bench"), wanted, bench_label(config)) as stage,
          ensure_ray(config), tracker.start("bench", fingerprint=wanted) as run):
        folder = stage.folder
        machine = place.record(folder)
        run.set_tags(hardware_tags(place.hardware))
        plan = replace(_plan(config, folder, methods, heads), champion=timed.folder if timed else None)
        inputs = input_digests(config, heads) | ({CHAMPION: (timed.digest, timed.model)} if timed else {})
        for name, (digest, where) in inputs.items():
            run.log_dataset(name, digest, where, "bench")
        task = ray.remote(_measure_watched).options(**measuring_resources(config), **place.options)
        usage: Usage = ray.get(task.remote(config, tracker.uri, run.run_id, plan, questions))
        used = usage.added_to(folder).figures()
        write_text(folder / ERRORS, "".join(json.dumps(error) + "\n" for error in errors))
        figures = summarise(read_rows(as_path(plan.rows_file)), read_losslessness(as_path(plan.losslessness_file)),
                            champion.method if champion else None)
        comparison = {"measured": datetime.now(UTC).isoformat(timespec="milliseconds"),
                      "champion": champion.to_json() if champion else None}
        batches = summarise_batches(read_batches(as_path(plan.batch_file)))
        load = summarise_concurrency(read_concurrency(as_path(plan.concurrency_file)))
        found = {"methods": figures, FIGURE: comparison, "batch": batches, "load": load}
        proof = read_proof(folder / PROOF)
        files = [machine, *_write_report(config, folder, found | ({"proof": proof} if proof else {}), plan)]
        record_bench(run, config, plan, figures, load, inputs["prompts"][0])
        run.log_metrics({name: used[name] for name in ("cpu_seconds", "kwh") if name in used})
        for path in files:
            run.log_artifact(path)
        return stage.finish(StageResult("bench", run.run_id, {"report": str(folder / "report.json")}, {
            "questions": len(questions), "errors": len(errors), "methods": figures, "hardware": place.hardware.label,
            FIGURE: comparison, **used,
            **({"batch": batches} if batches else {}), **({"load": load} if load else {})}), files)


def _measure_watched(config: RunConfig, uri: str, run_id: str, plan: BenchPlan, questions: list[Question]) -> Usage:
    """`measure`, while the load of its machine is logged; returns what it took."""
    with worker_system_metrics(config, uri, run_id):
        meter = Meter(gpus=float(pick_device(plan.base.device).type == "cuda"))
        measure(plan, questions)
        return meter.read()


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
        shared_noise=bench.shared_noise, threads=bench.threads, shared_answers=bench.shared_answers,
        prefix_cache_tokens=bench.prefix_cache_tokens, vllm_python=bench.vllm_python, vllm_settings=bench.vllm_settings,
        draft_model=config.draft_model.values())


def _write_report(config: RunConfig, folder: Path, found: dict[str, Any], plan: BenchPlan) -> list[Path]:
    how = f"temperature {plan.temperature:g}" if plan.temperature else "greedy"
    title = (f"{config.name}: {config.bench.max_new_tokens} new tokens at most, {how}, one request at a time, on "
             f"{measured_on(folder)}")
    memory, figures, batches, load = read_memory(folder / MEMORY), found["methods"], found["batch"], found["load"]
    write_text(folder / "report.json", json.dumps(found | {"memory": memory, "plan": plan.to_json()}, indent=2))
    write_text(folder / "report.md", markdown(figures, title, config.base.dtype) + category_markdown(figures)
               + steps_markdown(figures) + memory_markdown(memory) + batch_markdown(batches, plan) + concurrency_markdown(load))
    plots = draw(figures, folder)
    for table in (method_table(figures, title, config.base.dtype), category_table(figures), step_table(figures),
                  concurrency_table(load)):
        if table.rows:
            table.show()
    if load:
        plot_concurrency(load, folder / "load.png")
    written = ("rows.jsonl", ERRORS, "identity.jsonl", PROOF, "batch.jsonl", "load.jsonl", MEMORY, "report.json", "report.md",
               "load.png")
    return [folder / name for name in written if (folder / name).exists()] + plots
