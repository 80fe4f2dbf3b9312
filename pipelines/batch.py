"""`batch`: offline generation over a prompt file, through the Serve deployment; resumable row by row."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ray import serve

from hydra_core.errors import InputError
from pipelines.batch_worker import BatchSettings, BatchWriter, batch_parts, read_batch_rows
from pipelines.cluster import ensure_ray, run_blocks
from pipelines.config import RunConfig
from pipelines.contracts import ERRORS, PROMPTS, check_counts, content_id
from pipelines.parts import part_files, read_parts, sweep, write_part
from pipelines.prompt_files import RowError, prompt_files, read_prompt_rows
from pipelines.serve import check_args, find_args, start_app
from pipelines.serving.identity import Serving, serving_of
from pipelines.serving.instance import running_instance
from pipelines.serving.records import AppArgs
from pipelines.stage import (
    RunPaths,
    StageResult,
    file_digest,
    fingerprint,
    finished,
    require_manifest,
    stage_folder,
    write_text,
)
from pipelines.tracking import Tracker

STAGE = "batch"
HOW = {"concurrency", "rows_per_file", "max_error_share", "input", "output"}
"""Settings that change no answer: a run that failed may go on with others. The input counts by what it holds."""


def run_batch(config: RunConfig) -> StageResult:
    """Answer every row once. Raises InputError for the user's mistakes, and when too many rows fail."""
    section = config.batch
    args = find_args(config)
    serving = serving_of(args)
    folder, wanted = _folder(config), _fingerprint(config, serving)
    if (done := finished(folder, wanted)) is not None:
        return done
    tracker = Tracker.open(config)
    check_args(args)
    rows, errors, skipped = _read_input(config)
    with (stage_folder(config, STAGE, folder, wanted) as stage, ensure_ray(config),
          tracker.start(STAGE, fingerprint=wanted) as run,
          _application(config, args, serving) as label):
        report = _answer_all(config, folder, rows, errors, skipped, label)
        write_text(folder / "report.json", json.dumps(report, indent=2))
        run.log_metrics({name: value for name, value in report.items() if isinstance(value, (int, float))})
        run.log_artifact(folder / "report.json")
        outputs = {"rows": str(folder / "rows"), "errors": str(folder / "errors"), "report": str(folder / "report.json")}
        files = [*batch_parts(folder / "rows", section.format), *part_files(folder / "errors"), folder / "report.json"]
        return stage.finish(StageResult(STAGE, run.run_id, outputs, report), files)


def batch_finished(config: RunConfig) -> bool:
    """Whether `run_batch` would find this very work done. Raises InputError for a model, base or input that is not there."""
    return finished(_folder(config), _fingerprint(config, serving_of(find_args(config)))) is not None


def _folder(config: RunConfig) -> Path:
    return Path(config.batch.output) if config.batch.output else RunPaths.of(config).stage(STAGE)


def _fingerprint(config: RunConfig, serving: Serving) -> str:
    """What a `batch` folder is the answer to: settings, rows, and what decodes (not by which name it was asked for)."""
    return fingerprint(STAGE, config.batch.model_dump(exclude=HOW) | asdict(serving), {"input": _input_digest(config)})


@contextmanager
def _application(config: RunConfig, args: AppArgs, serving: Serving) -> Iterator[str]:
    """The running application, or one of our own that goes when the rows are done.

    Raises InputError when one of that name runs that is not ready or decodes with something else.
    """
    name, instance = config.serve.app_name, running_instance()
    if instance is None or name not in instance.applications:
        app = start_app(config, args)
        try:
            yield app.label
        finally:
            app.stop()
        return
    if (status := instance.applications[name][0]) != "RUNNING":
        raise InputError(f"serve.app_name={name}: the application of that name is {status}: wait, delete it or choose another")
    try:
        info = serve.get_deployment_handle("DecodeServer", name).info.remote().result()
        running = Serving(info["base"], info["context_limit"], info["configuration"])
    except KeyError as missing:
        raise InputError(f"serve.app_name={name}: runs something else, without {missing}: choose another name") from None
    if running != serving:
        raise InputError(f"serve.app_name={name}: runs {info['label']} ({running}), but {args.label} ({serving}) is asked "
                         "for: choose another name or stop it")
    yield info["label"]


def _answer_all(config: RunConfig, folder: Path, rows: list[dict[str, Any]], errors: list[dict[str, Any]], skipped: int,
                label: str) -> dict[str, Any]:
    section = config.batch
    for part in ("rows", "errors"):
        sweep(folder / part)
    for path in part_files(folder / "errors"):  # failed rows are tried again
        path.unlink()
    if errors:
        write_part(folder / "errors", errors, ERRORS)
    known = {row["id"] for row in read_batch_rows(folder / "rows", section.format)}
    todo = [row for row in rows if row["id"] not in known]
    settings = BatchSettings(str(folder), config.serve.app_name, label, section.format, section.max_new_tokens,
                             section.temperature, section.seed, section.concurrency, section.rows_per_file)
    print(f"batch: {len(rows)} rows, {len(known)} of them stood already", file=sys.stderr)
    started = time.perf_counter()
    size = max(section.rows_per_file, section.concurrency * 4)
    columns = ("id", "row", "prompt", "messages", "prompt_ids")
    blocks = [pa.table({name: pa.array([row[name] for row in todo[start:start + size]],
                                       BATCH_INPUT.field(name).type) for name in columns})
              for start in range(0, len(todo), size)]
    totals = run_blocks(BatchWriter, settings, blocks, actors=1, cpus=0.1)
    seconds = time.perf_counter() - started
    answered = list(read_batch_rows(folder / "rows", section.format))
    failed = len(errors) + totals.get("errors", 0)
    total = len(rows) + len(errors) + skipped
    print(f"batch: {total} rows = {len(answered)} ok + {failed} errors + {skipped} skipped", file=sys.stderr)
    check_counts(STAGE, total, len(answered), failed, skipped, section.max_error_share)
    return _report(answered, known, failed, skipped, seconds, label)


BATCH_INPUT = pa.schema([("id", pa.string()), ("row", pa.int64()), ("prompt", pa.string()), ("messages", pa.string()),
                         ("prompt_ids", pa.list_(pa.int32()))])


def _report(answered: list[dict[str, Any]], known: set[str], failed: int, skipped: int, seconds: float,
            label: str) -> dict[str, Any]:
    fresh = [row for row in answered if row["id"] not in known]
    tokens = sum(len(row["token_ids"]) for row in fresh)
    steps = sum(row["steps"] for row in answered)
    latencies = [row["latency_seconds"] for row in answered] or [0.0]
    return {"rows": len(answered), "errors": failed, "rows_skipped": skipped, "resumed": len(known),
            "tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / seconds, 2) if fresh else None,
            "tokens_per_step": round(sum(len(r["token_ids"]) - 1 for r in answered) / steps, 3) if steps else None,
            "latency_p50": round(float(np.percentile(latencies, 50)), 3),
            "latency_p99": round(float(np.percentile(latencies, 99)), 3), "model": label}


def _input_digest(config: RunConfig) -> str:
    if not config.batch.input:
        return str(require_manifest(RunPaths.of(config).stage("distill"), "distill")["fingerprint"])
    path = Path(config.batch.input)
    if not path.exists():
        raise InputError(f"batch.input={path}: no such file")
    return content_id(*(file_digest(file) for file in prompt_files(path)))


def _read_input(config: RunConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """Rows to answer, error rows, and how many repeated an id that stood before."""
    section = config.batch
    if not section.input:
        rows = read_parts(RunPaths.of(config).stage("distill") / "prompts", PROMPTS).to_pylist()
        held_out = sorted((row for row in rows if row["split"] == "held_out"), key=lambda row: row["prompt_id"])
        rest = sorted((row for row in rows if row["split"] != "held_out"), key=lambda row: row["prompt_id"])
        chosen = (held_out + rest)[:section.limit or len(held_out)]
        return [{"id": row["prompt_id"], "row": number, "prompt": row["prompt"], "messages": row["messages"],
                 "prompt_ids": row["prompt_ids"]} for number, row in enumerate(chosen, start=1)], [], 0
    found: dict[str, dict[str, Any]] = {}
    errors, skipped = [], 0
    for item in read_prompt_rows(section.input, section.field, section.limit):
        if isinstance(item, RowError):
            errors.append({"id": f"row-{item.row}", "stage": STAGE, "message": item.message})
            continue
        row_id = str(item.extra.get("id") or item.extra.get("prompt_id") or item.extra.get("custom_id")
                     or content_id(item.row, item.prompt, item.messages))
        if row_id in found:
            skipped += 1
            continue
        messages = None if item.messages is None else json.dumps(item.messages)
        found[row_id] = {"id": row_id, "row": item.row, "prompt": item.prompt, "messages": messages, "prompt_ids": None}
    return list(found.values()), errors, skipped
