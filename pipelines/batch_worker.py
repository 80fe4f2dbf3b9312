"""The Ray Data actor of `batch`: keeps requests in flight at the Serve deployment and writes part files."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray import serve

from pipelines.contracts import ERRORS, content_id
from pipelines.distill_workers import counts
from pipelines.parts import part_files, read_parts, write_part
from pipelines.serving.records import Answer, Generation, Refusal

BATCH = pa.schema([
    ("id", pa.string()), ("row", pa.int64()), ("text", pa.string()), ("token_ids", pa.list_(pa.int32())),
    ("finish_reason", pa.string()), ("steps", pa.int32()), ("tokens_per_step", pa.float32()),
    ("latency_seconds", pa.float32()), ("model", pa.string()),
], metadata={b"hydra_heads_schema": b"1"})
LONGEST_WAIT = 5.0  # seconds between tries while the replicas' queue is full


@dataclass(frozen=True)
class BatchSettings:
    """What the actor is given; plain values."""

    folder: str
    app_name: str
    label: str
    format: str
    max_new_tokens: int
    temperature: float
    seed: int
    concurrency: int
    rows_per_file: int


class BatchWriter:
    """Answers a block of rows through the deployment handle."""

    def __init__(self, settings: BatchSettings) -> None:
        self.settings = settings
        self.handle = serve.get_deployment_handle("DecodeServer", settings.app_name)
        self.pool = ThreadPoolExecutor(settings.concurrency)

    def __call__(self, block: pa.Table) -> pa.Table:
        folder = Path(self.settings.folder)
        futures = {self.pool.submit(self._ask, row): row for row in block.to_pylist()}
        pending: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        done = 0
        for future in as_completed(futures):
            row, found = futures[future], future.result()
            if isinstance(found, Refusal):
                errors.append({"id": row["id"], "stage": "batch", "message": found.message})
                continue
            done += 1
            pending.append(self._output(row, found))
            if len(pending) == self.settings.rows_per_file:
                self._write(folder / "rows", pending)
                pending = []
        if pending:
            self._write(folder / "rows", pending)
        if errors:
            write_part(folder / "errors", errors, ERRORS)
        print(f"batch: {done} rows answered, {len(errors)} failed", file=sys.stderr, flush=True)
        return counts(ok=done, errors=len(errors))

    def _ask(self, row: dict[str, Any]) -> Answer | Refusal:
        """One answer; a full queue means wait."""
        settings = self.settings
        messages = None if row["messages"] is None else json.loads(row["messages"])
        # a killed job's request may still be decoding, and two jobs may ask for the same row
        generation = Generation(f"batch-{row['id']}-{uuid.uuid4().hex}", settings.max_new_tokens, settings.temperature,
                                settings.seed, prompt=row["prompt"] if messages is None else None, messages=messages,
                                prompt_ids=row["prompt_ids"])
        wait = 0.1
        while True:
            found = self.handle.generate.remote(generation).result()
            if not isinstance(found, Refusal) or found.status != 429:
                return found
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _output(self, row: dict[str, Any], answer: Answer) -> dict[str, Any]:
        return {"id": row["id"], "row": row["row"], "text": answer.text, "token_ids": list(answer.token_ids),
                "finish_reason": answer.finish_reason, "steps": answer.steps, "tokens_per_step": answer.tokens_per_step,
                "latency_seconds": answer.latency_seconds, "model": self.settings.label}

    def _write(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        if self.settings.format == "parquet":
            write_part(folder, rows, BATCH)
        else:
            _write_jsonl(folder, rows)


def _write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".part-", suffix=".tmp", dir=folder)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, folder / f"part-{content_id(sorted(row['id'] for row in rows))}.jsonl")


def batch_parts(folder: Path, kind: str) -> list[Path]:
    """Finished part files of an output folder."""
    if kind == "parquet":
        return part_files(folder)
    return sorted(folder.glob("part-*.jsonl")) if folder.exists() else []


def read_batch_rows(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Rows that finished parts hold."""
    if kind == "parquet":
        yield from read_parts(folder, BATCH).to_pylist()
        return
    for path in batch_parts(folder, kind):
        with path.open(encoding="utf-8", newline="\n") as lines:  # an answer may hold other line ends, such as U+2028
            yield from map(json.loads, lines)
