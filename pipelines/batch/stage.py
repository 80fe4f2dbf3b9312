"""`batch`: offline generation over a prompt file, through the Serve deployment; resumable row by row.

Rows stream: in memory are a window of rows that are being sorted, the rows in flight, and 16 bytes for each id.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import serve

from hydra_core.errors import InputError
from hydra_core.storage import as_path
from pipelines.batch.backend import RequestSettings
from pipelines.batch.endpoint import FOREIGN, ask_endpoint
from pipelines.batch.engines import answer_with_engines
from pipelines.batch.http_backend import api_key
from pipelines.batch.input_digest import InputChanged, input_changed, input_digest, unchanged_rows
from pipelines.batch.model_names import check_model_names
from pipelines.batch.reader import Reading, ordered, output_kind, read_rows
from pipelines.batch.report import report
from pipelines.batch.worker import BatchSettings, BatchWorker
from pipelines.batch.writer import BATCH, BATCH_ERRORS, Output, OutputTotals, Writer, deduplicate, parts, set_aside
from pipelines.config import RunConfig
from pipelines.config.serve import PLAIN
from pipelines.rows.parquet_parts import sweep
from pipelines.rows.schemas import check_counts, content_id
from pipelines.runtime.artifacts import (
    RunPaths,
    StageResult,
    fingerprint,
    finished,
    require_manifest,
    stage_folder,
)
from pipelines.runtime.console import say
from pipelines.runtime.files import remove_file, write_text
from pipelines.runtime.lock import only_run
from pipelines.runtime.ray_cluster import check_workers, ensure_ray, environment_options
from pipelines.runtime.stores import check_every_node
from pipelines.runtime.tables import Table
from pipelines.runtime.vllm import check_sampling, check_temperature
from pipelines.serve.instance import ask_replicas, running_instance
from pipelines.serve.messages import AppArgs
from pipelines.serve.model_identity import ModelDigest, model_digest
from pipelines.serve.owner import this_job
from pipelines.serve.stage import check_args, find_args, start_app
from pipelines.tracking import Tracker

STAGE = "batch"
SUCCESS = "_SUCCESS"
MIXED = "mixed_input.txt"
"""Left where rows of two inputs are in one output."""
MADE_BY = "made_by.json"
"""Model and fingerprint of the first answer, of an endpoint that says no more of itself."""
EXECUTION_FIELDS = {"concurrency", "rows_per_file", "max_error_share", "input", "output", "partition", "engine", "address",
                    "key_variable", "row_seconds", "any_model", "shared_answers"}
"""Settings that change no answer: a run that failed may continue with others. The input counts by its content."""


@dataclass(frozen=True)
class Serving:
    """What answers: the digest of its model, the application to start or find (None for an endpoint given by address), the
    names of the models that it serves, and whether its answers carry the digest's fingerprint."""

    digest: ModelDigest
    args: AppArgs | None
    names: tuple[str, ...]
    ours: bool


def run_batch(config: RunConfig) -> StageResult:
    """Answer every row once. Raises InputError for the user's mistakes, while another run writes the same output, and when too
    many rows fail."""
    serving = _serving(config)
    folder, digest, kind = _folder(config), input_digest(config), output_kind(config.batch)
    wanted, earlier = _fingerprints(config, serving.digest, digest)
    if (done := _done(folder, wanted, earlier)) is not None:
        return done
    next(read_rows(config), None)  # raises for a file without a usable row before anything starts
    check_model_names(config, serving.names)
    tracker = Tracker.open(config)
    if serving.args is not None:
        check_args(serving.args)
    with only_run(folder, as_path(config.storage), "batch.output"):
        if (done := _done(folder, wanted, earlier)) is not None:  # finished by the run that held the lock until now
            return done
        _check_not_mixed(folder)
        with (stage_folder(config, STAGE, folder, wanted, earlier=earlier) as stage,
              tracker.start(STAGE, fingerprint=wanted) as run):
            remove_file(folder / SUCCESS)
            run.log_dataset("input", digest, config.batch.source or "held-out prompts of this run", STAGE)
            try:
                figures, read, files = _answer_all(config, folder, serving, digest)
            except InputChanged as error:
                if not parts(folder / "rows", kind):
                    raise
                write_text(folder / MIXED, f"{error}\n")  # a run with the first input again would take them for its own
                raise InputError(f"{error}: its rows and earlier ones are mixed in {folder}: delete that folder and run "
                                 "again") from None
            write_text(folder / "report.json", json.dumps(figures, indent=2))
            run.log_metrics({name: value for name, value in figures.items() if isinstance(value, (int, float))})
            run.log_artifact(folder / "report.json")
            run.describe(f"{figures['rows']:,} rows answered, {figures['errors']:,} errors, by {figures['model']}", Table(
                ("figure", "value"), [(name.replace("_", " "), str(value)) for name, value in figures.items()]).markdown())
            check_counts(STAGE, read, figures["rows"], figures["errors"], figures["rows_skipped"], config.batch.max_error_share,
                         hint=f"see {folder / 'errors'}")
            outputs = {"rows": str(folder / "rows"), "errors": str(folder / "errors"), "report": str(folder / "report.json")}
            result = stage.finish(StageResult(STAGE, run.run_id, outputs, figures), [*files, folder / "report.json"])
        write_text(folder / SUCCESS, "")
        return result


def batch_finished(config: RunConfig) -> bool:
    """Whether `run_batch` would find the same work finished. Raises InputError for a missing model, base or input."""
    return finished(_folder(config), *_fingerprints(config, _serving(config).digest, input_digest(config))) is not None


def _check_not_mixed(folder: Path) -> None:
    if (folder / MIXED).exists():
        raise InputError(f"{folder}: holds rows of an input that changed while it was read: delete that folder and run again")


def _done(folder: Path, wanted: str, earlier: list[str]) -> StageResult | None:
    """The result of a finished run, with a line for the user. Writes the success marker where a kill prevented that, and sets
    aside what a killed job wrote after the end of the one that followed it: every row of it has its place already."""
    if (done := finished(folder, wanted, earlier)) is not None:
        listed = require_manifest(folder, STAGE)["files"]
        for part in ("rows", "errors"):
            for kind in ("parquet", "jsonl"):
                for path in parts(folder / part, kind):
                    if f"{part}/{path.name}" not in listed:
                        set_aside(path, "late", "was written after the job had ended")
        say(STAGE, f"{folder} is finished already, with {done.figures['rows']} rows: nothing to do")
        if not (folder / SUCCESS).exists():
            write_text(folder / SUCCESS, "")
    return done


def _serving(config: RunConfig) -> Serving:
    if config.batch.address:
        found = ask_endpoint(config.batch.address, config.serve.app_name, api_key(config.batch.key_variable))
        return Serving(found.digest, None, found.names, ours=found.ours)
    args = find_args(config)
    if args.vllm is not None and config.batch.shared_answers:
        raise InputError("batch.shared_answers: vLLM drafts from no other answers: leave it out")
    if args.vllm is not None:
        check_temperature("batch.temperature", config.batch.temperature)
        check_sampling(config, args.configuration is not None, "batch.temperature", config.batch.temperature)
    return Serving(model_digest(args), args, (config.serve.app_name,), ours=True)


def _folder(config: RunConfig) -> Path:
    section = config.batch
    return as_path(section.target) if section.target else RunPaths.of(config).stage(STAGE, section.partition)


def _fingerprints(config: RunConfig, serving: ModelDigest, digest: str) -> tuple[str, list[str]]:
    """Digest of settings, input rows and the base; the name under which the model was requested has no part in it, and neither
    have the heads, which change no answer. And those of earlier versions, in which the heads had."""
    settings = config.batch.model_dump(exclude=EXECUTION_FIELDS) | {"format": output_kind(config.batch)}
    base = {"base": serving.base, "context_limit": serving.context_limit}
    told = [base, *(base | {"configuration": heads} for heads in (serving.configuration, PLAIN, FOREIGN))]
    wanted, *earlier = (fingerprint(STAGE, settings | part, {"input": digest}) for part in told)
    return wanted, earlier


def _answer_all(config: RunConfig, folder: Path, serving: Serving, digest: str) -> tuple[dict[str, Any], int, list[Path]]:
    """Answer the rows that have no answer yet, and count: returns the report, the number of rows read, and the parts
    that hold what was counted: another one, which a killed job writes now, is none of the output."""
    section, kind = config.batch, output_kind(config.batch)
    for part in ("rows", "errors"):
        sweep(folder / part)
    for path in parts(folder / "errors", kind):  # failed rows are retried
        remove_file(path)
    before = deduplicate(folder / "rows", kind, BATCH)
    say(STAGE, f"{len(before.ids)} rows were answered already")
    if not before.ids:
        remove_file(folder / MADE_BY)
    request_settings = RequestSettings(
        config.serve.app_name, section.max_new_tokens, section.temperature, section.seed, config.serve.max_batch_size,
        row_seconds=section.row_seconds, serves=serving.digest.fingerprint if serving.ours else None,
        made_by=str(folder / MADE_BY), any_model=section.any_model)
    with _backend(config, serving, request_settings) as (request_settings, label):
        output = Output(str(folder), kind, label, section.rows_per_file)
        started = time.perf_counter()
        read, skipped, made_by = _stream(config, digest, before, BatchSettings(output, request_settings, in_flight(config)))
        seconds = time.perf_counter() - started
    rows = deduplicate(folder / "rows", kind, BATCH)
    errors = deduplicate(folder / "errors", kind, BATCH_ERRORS, elsewhere=rows.ids)
    say(STAGE, f"{read} rows = {len(rows.ids)} ok + {len(errors.ids)} errors + {skipped} skipped")
    figures = report(rows, errors, before, skipped, seconds, label)
    return figures | ({"made_by": made_by} if made_by else {}), read, [*rows.parts, *errors.parts]


def _stream(config: RunConfig, digest: str, before: OutputTotals, settings: BatchSettings) -> tuple[int, int, str]:
    """Send rows from the input to the backend: from this process, or in a flow through engines. Returns how many rows were read
    and skipped, and what made the answers, as far as this process has seen them."""
    if settings.requests.embedded is not None:
        counts = answer_with_engines(config, digest, settings, before.ids)
        if counts["changed"]:
            raise input_changed(config)
        return counts["read"], counts["skipped"], str(settings.requests.serves)
    refused = Writer(settings.output)
    reading = Reading(refused.refuse)
    try:
        worker = BatchWorker(settings)
        worker.answer(ordered(reading.todo(unchanged_rows(config, digest), before.ids)))
        worker.backend.stop()
    finally:
        refused.flush()
    return reading.rows, reading.skipped, worker.backend.made_by


def in_flight(config: RunConfig) -> int:
    """Requests in flight; of one worker, where each worker has an engine. Enough that no slot of a replica is idle until the
    next request arrives, and few enough that waiting requests can go to the replica that has room first."""
    serve, section = config.serve, config.batch
    replicas = 1 if section.engine == "embedded" else max(serve.replicas, serve.max_replicas or 0)
    return section.concurrency or 2 * serve.max_batch_size * replicas


@contextmanager
def _backend(config: RunConfig, serving: Serving,
             settings: RequestSettings) -> Iterator[tuple[RequestSettings, str]]:
    """Request settings that name the backend, and the model's label. What is started here (Ray, an application) ends with it."""
    section, args = config.batch, serving.args
    if args is None:
        yield replace(settings, address=section.address, key_variable=section.key_variable), str(serving.digest.base)
        return
    with ensure_ray(config):
        if section.engine == "embedded":
            check_workers("serve.workers", config.serve.workers, config.serve.replicas)
            check_every_node("batch.output", _folder(config), environment_options(config))
            own = replace(args, max_queued=in_flight(config), shared_answers=section.shared_answers)
            yield replace(settings, embedded=own), args.label
            return
        with _application(config, args, serving.digest) as (name, label):
            yield replace(settings, app_name=name), label


@contextmanager
def _application(config: RunConfig, args: AppArgs, serving: ModelDigest) -> Iterator[tuple[str, str]]:
    """Name and label of the running application, or of one that is started here and stopped with the block.

    Raises InputError when an application of that name is not ready or decodes with another base; other heads change no answer.
    """
    name, instance = config.serve.app_name, running_instance()
    if instance is None or name not in instance.applications:
        with _own_application(config, args, serving) as own:
            yield own, args.label
        return
    if (status := instance.applications[name].status) != "RUNNING":
        raise InputError(f"serve.app_name={name}: the application of that name is {status}: wait, delete it or choose another")
    info = ask_replicas(name)
    running = ModelDigest(info["base"], info["context_limit"], info["configuration"])
    if (running.base, running.context_limit) != (serving.base, serving.context_limit):
        raise InputError(f"serve.app_name={name}: runs {info['label']} ({running}), but {args.label} ({serving}) is asked "
                         "for: choose another name or stop that application")
    yield name, info["label"]


@contextmanager
def _own_application(config: RunConfig, args: AppArgs, serving: ModelDigest) -> Iterator[str]:
    """An application for this output alone, without a route, so that nobody else uses it. Those that killed runs left behind, and
    that have not ended yet, are deleted first: the holder of the output's lock is their only user."""
    ours = f"{args.app_name}-batch-{content_id(str(_folder(config)))}"
    name = f"{ours}-{this_job()}"  # of its own: one that is ending by itself deletes its name
    for left in () if (instance := running_instance()) is None else instance.applications:
        if left.startswith(ours):
            serve.delete(left)
    app = start_app(config, replace(args, app_name=name, shared_answers=config.batch.shared_answers), route=None)
    try:
        yield name
    finally:
        app.stop()
