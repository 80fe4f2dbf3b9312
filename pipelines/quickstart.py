"""`quickstart`: the whole chain, small, on one machine, with a summary people can read."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.batch import run_batch
from pipelines.bench import run_bench
from pipelines.bench_report import print_table
from pipelines.cluster import ensure_ray
from pipelines.config import RunConfig
from pipelines.distill import run_distill
from pipelines.promote import run_promote
from pipelines.serve import start_app
from pipelines.stage import RunPaths, StageResult
from pipelines.tracking import Tracker, ui_command
from pipelines.train import run_train
from pipelines.tree import run_tree

CHAIN: tuple[tuple[str, Callable[[RunConfig], StageResult]], ...] = (
    ("distill", run_distill), ("train", run_train), ("tree", run_tree), ("bench", run_bench), ("promote", run_promote))


def run_quickstart(config: RunConfig) -> StageResult:
    """Run every stage, skipping those whose manifest says that this very work is done."""
    results: dict[str, StageResult] = {}
    seconds: dict[str, float] = {}
    with ensure_ray(config):
        tracker = Tracker.open(config)
        for name, run in CHAIN:
            results[name], seconds[name] = _timed(name, run, config)
        started = time.perf_counter()
        app = None if _batch_done(config) else start_app(config)
        seconds["serve"] = time.perf_counter() - started
        try:
            results["batch"], seconds["batch"] = _timed("batch", run_batch, config)
        finally:
            if app is not None:
                app.stop()
        parent = tracker.parent()
        tracker.end_parent()
    _summary(config, results, seconds)
    outputs = {name: str(RunPaths.of(config).stage(name)) for name in results} | {"model": results["promote"].outputs["model"]}
    figures = {"seconds": {name: round(value, 1) for name, value in seconds.items()},
               "champion": results["promote"].figures["champion"], "why": results["promote"].figures["why"],
               "methods": results["bench"].figures["methods"],
               "response_tokens": results["distill"].figures["response_tokens"],
               "batch_rows": results["batch"].figures["rows"]}
    return StageResult("quickstart", parent, outputs, figures, all(result.skipped for result in results.values()))


def _timed(name: str, run: Callable[[RunConfig], StageResult], config: RunConfig) -> tuple[StageResult, float]:
    _say(f"quickstart: {name} ...")
    started = time.perf_counter()
    result = run(config)
    taken = time.perf_counter() - started
    _say(f"quickstart: {name} {'was done already' if result.skipped else f'took {taken / 60:.1f} min'}")
    return result, taken


def _batch_done(config: RunConfig) -> bool:
    return (RunPaths.of(config).stage("batch") / "manifest.json").exists()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _summary(config: RunConfig, results: dict[str, StageResult], seconds: dict[str, float]) -> None:
    """The table, the time of each stage, where things lie, and the two commands to go on with."""
    methods: dict[str, Any] = results["bench"].figures["methods"]
    print_table(methods, f"{config.name}: greedy, one request at a time, {config.bench.max_new_tokens} new tokens at most",
                config.base.dtype, sys.stderr)
    table = Table(title="Stages")
    for column in ("stage", "minutes", "output"):
        table.add_column(column)
    for name, taken in seconds.items():
        skipped = name in results and results[name].skipped
        table.add_row(name, "done before" if skipped else f"{taken / 60:.1f}",
                      "-" if name == "serve" else str(RunPaths.of(config).stage(name)))
    Console(file=sys.stderr, width=140).print(table)
    promoted = results["promote"].figures
    _say(f"champion: {promoted['champion']} (version {promoted['version']}): {promoted['why']}")
    _say(f"see it:   {ui_command(config)}")
    _say(f"serve it: hydra-heads serve storage={config.storage}")
