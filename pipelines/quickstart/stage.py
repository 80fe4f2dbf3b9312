"""`quickstart`: the whole chain, small, on one machine, with a summary for people."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError
from hydra_core.storage import as_path
from pipelines.batch.stage import batch_finished, run_batch
from pipelines.bench.report import method_table
from pipelines.bench.stage import run_bench
from pipelines.config import RunConfig, load_config
from pipelines.distill.stage import run_distill
from pipelines.promote.stage import run_promote
from pipelines.quickstart.first_answers import show_first_answers
from pipelines.runtime.artifacts import CLAIM, MANIFEST, RunPaths, StageResult, damaged, read_manifest, remove_content
from pipelines.runtime.console import say
from pipelines.runtime.files import remove_file
from pipelines.runtime.lock import only_run
from pipelines.runtime.programs import program
from pipelines.runtime.ray_cluster import check_workers, ensure_ray
from pipelines.runtime.tables import Table
from pipelines.serve.instance import bindable_port, running_instance
from pipelines.serve.stage import resolve_args, serving_params, start_app
from pipelines.tracking import Tracker, ui_command
from pipelines.train.deepspeed_config import check_toolchain
from pipelines.train.stage import run_train
from pipelines.tree.stage import run_tree

CHAIN: tuple[tuple[str, Callable[[RunConfig], StageResult]], ...] = (
    ("distill", run_distill), ("train", run_train), ("tree", run_tree), ("bench", run_bench), ("promote", run_promote))


def run_quickstart(config: RunConfig) -> StageResult:
    """Run every stage, except those whose manifest says that the same work is finished. Before the first one, a few questions are
    answered with the bundled heads, if there are any for this base.

    Raises InputError at once for what a later stage would lack: MLflow, a compiler, CPUs, the port, the speed of single requests;
    and if another quickstart of this name works now.
    """
    with only_run(RunPaths.of(config).run / "quickstart", as_path(config.storage)):
        return _run(config)


def _run(config: RunConfig) -> StageResult:
    if not config.bench.single:
        raise InputError("bench.single=false: the champion is chosen by the speed of single requests: leave it true")
    tracker = Tracker.open(config)
    _drop_stale(config)
    whole = _batch_is_finished(config)
    if not whole:
        check_toolchain(config.train.workers.gpus > 0)
    with ensure_ray(config):
        if not whole:
            _check_cluster(config)
            if read_manifest(RunPaths.of(config).stage("distill")) is None:
                show_first_answers(config)
        try:
            results, seconds = _run_chain(config)
        except BaseException:
            tracker.end_parent("FAILED")  # its status is that of the last stage that ended
            raise
    _summary(config, results, seconds)
    outputs = {name: str(_folder(config, name, results)) for name in results} | {"model": results["promote"].outputs["model"]}
    figures = {"seconds": {name: round(value, 1) for name, value in seconds.items()},
               "champion": results["promote"].figures["champion"], "why": results["promote"].figures["why"],
               "methods": results["bench"].figures["methods"],
               "response_tokens": results["distill"].figures["response_tokens"],
               "batch_rows": results["batch"].figures["rows"]}
    return StageResult("quickstart", tracker.parent(), outputs, figures, all(result.skipped for result in results.values()))


def _run_chain(config: RunConfig) -> tuple[dict[str, StageResult], dict[str, float]]:
    """Result and seconds of every stage. The application runs while `batch` does, and is stopped afterwards."""
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
    """Run the champion's application, tracked as a stage of the chain."""
    args = resolve_args(config)
    app = start_app(config, args)
    try:
        with Tracker.open(config).start("serve", params=serving_params(args)):
            yield
    finally:
        app.stop()


def _timed(name: str, run: Callable[[RunConfig], StageResult], config: RunConfig) -> tuple[StageResult, float]:
    say("quickstart", f"{name} ...")
    started = time.perf_counter()
    result = run(config)
    taken = time.perf_counter() - started
    say("quickstart", f"{name} {'was done already' if result.skipped else f'took {taken / 60:.1f} min'}")
    return result, taken


def _batch_is_finished(config: RunConfig) -> bool:
    """Whether the whole chain is finished: the fingerprint of its last stage covers all the others."""
    try:
        return batch_finished(config)
    except InputError:  # there is no champion yet, or no rows
        return False


def _check_cluster(config: RunConfig) -> None:
    """Raise InputError for workers that never fit and for a port in use: at once, not after half an hour."""
    check_workers("distill.workers", config.distill.workers)
    check_workers("train.workers", config.train.workers)
    check_workers("serve.workers", config.serve.workers, config.serve.replicas)
    if running_instance() is None:
        bindable_port(config.serve.host, config.serve.port)


def _drop_stale(config: RunConfig) -> None:
    """Delete what this chain built on a stage whose files were changed: that stage runs again and its outputs will differ.

    Not so for `distill` and `promote`: both produce the same outputs again. Raises InputError if another run works in what is to
    be deleted.
    """
    stale = False
    for stage in ("train", "tree", "bench", "promote", "batch"):
        folders = _own_folders(config, stage)
        if stale:
            for folder in folders:
                with only_run(folder, as_path(config.storage)):
                    remove_file(folder / MANIFEST)  # first, so that a killed run leaves nothing that looks finished
                    remove_content(folder)
        elif stage in ("train", "tree", "bench") and any(map(damaged, folders)):
            stale = True
            say("quickstart", f"{RunPaths.of(config).stage(stage)}: its files were changed: this stage and those that were built "
                              "on it run again")


def _own_folders(config: RunConfig, stage: str) -> list[Path]:
    """The folders of a stage that this chain writes to. Of other drafters, other benches and other partitions of `batch` in the
    same run it knows nothing."""
    paths = RunPaths.of(config)
    if stage in ("train", "tree"):
        folders = [paths.stage(stage, name) for name in ([config.train.only] if config.train.only else config.train.drafters)]
    elif stage == "batch":
        folders = [] if config.batch.target else [paths.stage(stage, config.batch.partition)]
    else:
        root = paths.stage(stage)
        folders = [folder for folder in (root, *(path.parent for path in sorted(root.glob(f"*/{CLAIM}"))))
                   if _has_settings(config, folder, ("bench", "promote" if stage == "promote" else "ngram", "draft_model"))]
    return [folder for folder in folders if (folder / CLAIM).exists()]


def _has_settings(config: RunConfig, folder: Path, sections: tuple[str, ...]) -> bool:
    """Whether the finished result in `folder` was made with the settings of `config`."""
    try:
        then = load_config(str(folder / "config.yaml"))
    except InputError:  # it is not finished, or of another version
        return False
    return then.base.dtype == config.base.dtype and all(getattr(then, name) == getattr(config, name) for name in sections)


def _folder(config: RunConfig, name: str, results: dict[str, StageResult]) -> Path:
    """Where the outputs of a stage lie; for `bench` and `promote` the folder of the result that these settings ask for."""
    output = {"bench": "report", "promote": "configuration"}.get(name)
    return as_path(results[name].outputs[output]).parent if output else RunPaths.of(config).stage(name)


def _summary(config: RunConfig, results: dict[str, StageResult], seconds: dict[str, float]) -> None:
    """Print the bench's table, the time of each stage with its folder, and the next two commands."""
    methods: dict[str, Any] = results["bench"].figures["methods"]
    method_table(methods, f"{config.name}: greedy, one request at a time, at most {config.bench.max_new_tokens} new tokens",
                 config.base.dtype).show()
    Table(("stage", "minutes", "output"), [
        (name, "done before" if name in results and results[name].skipped else f"{taken / 60:.1f}",
         "-" if name == "serve" else str(_folder(config, name, results))) for name, taken in seconds.items()], "Stages").show()
    promoted = results["promote"].figures
    say("champion", f"{promoted['champion']} (version {promoted['version']}): {promoted['why']}")
    say("see it", f"  {ui_command(config)}")
    saved = _folder(config, "promote", results) / "config.yaml"
    serve_command = [*program("hydra-heads", "jobs.cli"), "serve", "--config", str(saved)]
    say("serve it", shlex.join(serve_command))
