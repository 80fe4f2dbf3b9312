"""`quickstart`: the whole chain, small, on one machine, with a summary people can read."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table

from hydra_core.errors import InputError
from pipelines.batch.stage import batch_finished, run_batch
from pipelines.bench.report import print_table
from pipelines.bench.stage import run_bench
from pipelines.config import RunConfig
from pipelines.distill.stage import run_distill
from pipelines.promote.stage import run_promote
from pipelines.runtime.artifacts import MANIFEST, RunPaths, StageResult, damaged
from pipelines.runtime.programs import program
from pipelines.runtime.ray_cluster import check_workers, ensure_ray
from pipelines.serve.instance import bindable_port, running_instance
from pipelines.serve.stage import resolve_args, serving_params, start_app
from pipelines.tracking import Tracker, ui_command
from pipelines.train.deepspeed_config import check_toolchain
from pipelines.train.stage import run_train
from pipelines.tree.stage import run_tree

CHAIN: tuple[tuple[str, Callable[[RunConfig], StageResult]], ...] = (
    ("distill", run_distill), ("train", run_train), ("tree", run_tree), ("bench", run_bench), ("promote", run_promote))


def run_quickstart(config: RunConfig) -> StageResult:
    """Run every stage, skipping those whose manifest says that this very work is done.

    Raises InputError at once for what a later stage would miss: MLflow, a compiler, CPUs, the port.
    """
    tracker = Tracker.open(config)
    _drop_stale(config)
    whole = _batch_stands(config)
    if not whole:
        check_toolchain(config.train.workers.gpus > 0)
    with ensure_ray(config):
        if not whole:
            _check_cluster(config)
        try:
            results, seconds = _run_chain(config)
        except BaseException:
            tracker.end_parent("FAILED")  # whichever stage was the last to end
            raise
    _summary(config, results, seconds)
    outputs = {name: str(RunPaths.of(config).stage(name)) for name in results} | {"model": results["promote"].outputs["model"]}
    figures = {"seconds": {name: round(value, 1) for name, value in seconds.items()},
               "champion": results["promote"].figures["champion"], "why": results["promote"].figures["why"],
               "methods": results["bench"].figures["methods"],
               "response_tokens": results["distill"].figures["response_tokens"],
               "batch_rows": results["batch"].figures["rows"]}
    return StageResult("quickstart", tracker.parent(), outputs, figures, all(result.skipped for result in results.values()))


def _run_chain(config: RunConfig) -> tuple[dict[str, StageResult], dict[str, float]]:
    """Result and seconds of every stage. The application is up while `batch` runs and down afterwards."""
    results: dict[str, StageResult] = {}
    seconds: dict[str, float] = {}
    for name, run in CHAIN:
        results[name], seconds[name] = _timed(name, run, config)
    started = time.perf_counter()
    with nullcontext() if batch_finished(config) else _served(config):
        seconds["serve"] = time.perf_counter() - started
        results["batch"], seconds["batch"] = _timed("batch", run_batch, config)
    return results, seconds


@contextmanager
def _served(config: RunConfig) -> Iterator[None]:
    """The champion's application, up and tracked as a stage of the chain."""
    args = resolve_args(config)
    app = start_app(config, args)
    try:
        with Tracker.open(config).start("serve", params=serving_params(args)):
            yield
    finally:
        app.stop()


def _timed(name: str, run: Callable[[RunConfig], StageResult], config: RunConfig) -> tuple[StageResult, float]:
    _say(f"quickstart: {name} ...")
    started = time.perf_counter()
    result = run(config)
    taken = time.perf_counter() - started
    _say(f"quickstart: {name} {'was done already' if result.skipped else f'took {taken / 60:.1f} min'}")
    return result, taken


def _batch_stands(config: RunConfig) -> bool:
    """Whether the whole chain has been run: what its last stage is made of stands too."""
    try:
        return batch_finished(config)
    except InputError:  # no champion or no rows yet
        return False


def _check_cluster(config: RunConfig) -> None:
    """Raise InputError for workers that will never fit and for a port in use: told now, not after half an hour."""
    check_workers("distill.workers", config.distill.workers)
    check_workers("train.workers", config.train.workers)
    check_workers("serve.workers", config.serve.workers, config.serve.replicas)
    if running_instance() is None:
        bindable_port(config.serve.host, config.serve.port)


def _drop_stale(config: RunConfig) -> None:
    """A stage whose files were changed is made again, and comes out otherwise: what was built on it goes.

    Not after `distill` and `promote`: both make the same again.
    """
    stale = False
    for stage in ("train", "tree", "bench", "promote", "batch"):
        folder = RunPaths.of(config).stage(stage)
        if stale:
            shutil.rmtree(folder, ignore_errors=True)
        elif stage in ("train", "tree", "bench") and any(damaged(path.parent) for path in folder.rglob(MANIFEST)):
            stale = True
            _say(f"quickstart: {folder}: its files were changed: it is made again, and so is what was built on it")


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
    saved = RunPaths.of(config).stage("promote") / "config.yaml"
    serve_command = [*program("hydra-heads", "jobs.cli"), "serve", "--config", str(saved)]
    _say(f"serve it: {shlex.join(serve_command)}")
