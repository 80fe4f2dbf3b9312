"""Kills between any two writes, torn parts, parts of a killed job that come late, faults: every row has one place in the end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pipelines.batch import stage as batch_stage
from pipelines.batch import worker as batch_worker
from pipelines.batch.backend import Response
from pipelines.batch.reader import BatchRow
from pipelines.batch.retry import RetryPolicy
from pipelines.batch.stage import Serving, run_batch
from pipelines.batch.writer import Output, Writer, parts
from pipelines.config import RunConfig, load_config
from pipelines.runtime.artifacts import StageResult, damaged
from tests.pipelines.batch.stand_in import A
from tests.pipelines.batch.test_stage import read_batch_errors

GOOD, REPEATED, LINES = 14, 1, 18
"""Rows that are answered, repetitions, and lines of the input; the others are errors."""


class Killed(BaseException):
    """The process is dead: nothing that it would still do happens."""


class Disk:
    """Renames and removals, of which one may be the last: `left` more are done before the kill."""

    def __init__(self) -> None:
        self.left: int | None = None
        self.replace, self.unlink = os.replace, os.unlink

    def _step(self, path: Any) -> None:
        if self.left is None or str(path).endswith(".lock"):  # a lock ends with its process
            return
        self.left -= 1
        if self.left < 0:
            raise Killed

    @contextmanager
    def kills(self, after: int | None) -> Iterator[None]:
        self.left = after

        def replace(source: Any, target: Any, **more: Any) -> None:
            self._step(target)
            self.replace(source, target, **more)

        def unlink(path: Any, **more: Any) -> None:
            self._step(path)
            self.unlink(path, **more)

        os.replace, os.unlink = replace, unlink  # type: ignore[assignment]
        try:
            yield
        finally:
            os.replace, os.unlink = self.replace, self.unlink


class Fake:
    """A backend that answers each row with its prompt, refuses those that say so, and fails those of `faults`."""

    made_by = "fake"

    def __init__(self, asked: set[str], faults: set[int]) -> None:
        self.retry_policy, self.asked, self.faults = RetryPolicy("fake"), asked, faults

    def stop(self) -> None:
        self.retry_policy.stop()

    def ask(self, row: BatchRow) -> Response:
        assert row.id not in self.asked, "asked twice in one run"
        self.asked.add(row.id)
        if row.row in self.faults:
            return Response(500, "broken")
        return reply(row)


def prompt_of(row: BatchRow) -> str:
    return str(row.prompt if row.body is None else row.body["prompt"])


def reply(row: BatchRow) -> Response:
    if "refuse" in prompt_of(row):
        return Response(400, "refused", body={"error": {"message": "refused"}})
    body = {"choices": [{"text": prompt_of(row)}], "usage": {"completion_tokens": 1}}
    return Response(200, columns={"text": prompt_of(row), "token_ids": [5], "tokens": 1, "finish_reason": "stop", "steps": 0,
                                  "drafted": 0, "accepted": 0, "tokens_per_step": 0.0, "latency_seconds": 0.1}, body=body)


def write_input(path: Path, openai: bool) -> None:
    """`GOOD` rows, one twice; a row that is refused, one that is none, one whose id another row has."""
    prompts = [(f"row-{number}", f"p{number}") for number in range(1, GOOD + 1)]  # ids as those of bad lines
    prompts += [("row-3", "p3"), ("row-4", "another"), ("last", "refuse")]
    lines = [json.dumps({"custom_id": name, "url": "/v1/completions", "body": {"prompt": text}} if openai
                        else {"id": name, "prompt": text}) for name, text in prompts]
    path.write_text("\n".join([*lines[:4], "oops", *lines[4:]]) + "\n", encoding="utf-8")


class Job(RuleBasedStateMachine):
    """One output folder, and everything that may happen to it."""

    part = Bundle("part")
    root: Path

    @initialize(kind=st.sampled_from(["jsonl", "parquet", "openai"]), rows_per_file=st.integers(1, 5))
    def begin(self, kind: str, rows_per_file: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="job-"))
        self.kind, self.finished = kind, False
        write_input(self.root / "in.jsonl", kind == "openai")
        self.config: RunConfig = load_config(None, {
            "storage": str(self.root / "storage"), "batch.input": str(self.root / "in.jsonl"), "batch.format": kind,
            "batch.output": str(self.root / "out"), "batch.address": "http://h", "batch.rows_per_file": rows_per_file,
            "batch.concurrency": 3, "batch.max_error_share": 0.9})
        found = [row for row in batch_stage.read_rows(self.config) if isinstance(row, BatchRow)]
        self.rows = list({row.id: row for row in reversed(found)}.values())  # the first of those under one id

    def run(self, kill_after: int | None = None, faults: set[int] = frozenset()) -> StageResult | None:  # type: ignore[assignment]
        """Run the job; None when it was killed."""
        asked: set[str] = set()
        standing = self.standing()
        batch_worker.open_backend = lambda _: Fake(asked, faults)  # type: ignore[assignment,misc]
        try:
            with Disk().kills(kill_after):
                result = run_batch(self.config)
        except Killed:
            return None
        finally:
            assert not asked & standing  # what was answered is not asked again
        return result

    def standing(self) -> set[str]:
        """Ids of the rows in whole parts that the manifest, if there is one, knows."""
        found: set[str] = set()
        folder = self.root / "out"
        for path in set(parts(folder / "rows", self.kind)) - set(damaged(folder)):
            try:
                found |= {str(row.get("custom_id", row.get("id"))) for row in read_batch_errors_of(path, self.kind)}
            except (ValueError, OSError):
                continue
        return found

    @rule(after=st.integers(0, 30), faults=st.sets(st.integers(1, LINES), max_size=4))
    def killed(self, after: int, faults: set[int]) -> None:
        self.finished = self.run(after, faults) is not None

    @rule(faults=st.sets(st.integers(1, LINES), max_size=4))
    def runs(self, faults: set[int]) -> None:
        """A whole run, perhaps with rows at which the server fails: they are errors, of this run only if it is the last."""
        if not self.finished:
            assert self.run(None, faults) is not None
            self.finished = True

    @precondition(lambda self: parts(self.root / "out" / "rows", self.kind))
    @rule(number=st.integers(0, 20), cut=st.integers(2, 40), errors=st.booleans())
    def torn(self, number: int, cut: int, errors: bool) -> None:
        """A power cut: the end of a part is missing."""
        found = parts(self.root / "out" / ("errors" if errors else "rows"), self.kind)
        if found:
            path = found[number % len(found)]
            path.write_bytes(path.read_bytes()[:-cut])
            self.finished = False

    @rule(numbers=st.sets(st.integers(0, GOOD), min_size=1, max_size=4), one_by_one=st.booleans())
    def late(self, numbers: set[int], one_by_one: bool) -> None:
        """A killed job's thread writes what it had: at any time, the end of the next job included."""
        if not (self.root / "out").exists():
            return
        writer = Writer(Output(str(self.root / "out"), self.kind, "late", 1 if one_by_one else 64))
        for number in sorted(numbers):
            row = self.rows[number % len(self.rows)]
            if "refuse" not in prompt_of(row):
                writer.add(row, reply(row))
        writer.flush()

    def teardown(self) -> None:
        """The last run finishes the job, and the next one finds it finished."""
        if not hasattr(self, "config"):
            return
        try:
            self._check()
        finally:
            shutil.rmtree(self.root)

    def _check(self) -> None:
        result = self.run()
        assert result is not None
        if result.skipped and result.figures["errors"] > LINES - GOOD - REPEATED:
            return self._check_places(result)  # a run with faults had finished the job: its error rows are its result
        assert (result.figures["rows"], result.figures["errors"], result.figures["rows_skipped"]) == (
            GOOD, LINES - GOOD - REPEATED, REPEATED)
        self._check_places(result)
        return None

    def _check_places(self, result: StageResult) -> None:
        folder = self.root / "out"
        rows, errors = (read_batch_errors(folder / name, self.kind) for name in ("rows", "errors"))
        ids = [str(row.get("custom_id", row.get("id"))) for row in rows]
        assert len(ids) == len(set(ids)) == result.figures["rows"] and len(errors) == result.figures["errors"]
        assert len(rows) + len(errors) + REPEATED == LINES
        wanted = {row.id: prompt_of(row) for row in self.rows}
        for row in rows:
            text = row["response"]["body"]["choices"][0]["text"] if self.kind == "openai" else row["text"]  # type: ignore[index]
            assert text == wanted[str(row.get("custom_id", row.get("id")))]
        assert not damaged(folder) and (folder / "_SUCCESS").exists()
        again = self.run()
        assert again is not None and again.skipped


def read_batch_errors_of(path: Path, kind: str) -> list[dict[str, object]]:
    import pyarrow.parquet as pq

    if kind == "parquet":
        return list(pq.read_table(path).to_pylist())
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@contextmanager
def untracked() -> Iterator[SimpleNamespace]:
    nothing = lambda *_, **__: None  # noqa: E731
    yield SimpleNamespace(run_id=None, log_dataset=nothing, log_metrics=nothing, log_artifact=nothing, describe=nothing)


def test_every_row_has_one_place_in_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(batch_stage, "_serving", lambda _: Serving(A, None, ("hydra-heads",), ours=True))
    monkeypatch.setattr(batch_stage.Tracker, "open", lambda _: SimpleNamespace(start=lambda *_, **__: untracked()))
    monkeypatch.setattr(batch_worker, "open_backend", None)
    run_state_machine_as_test(Job, settings=settings(max_examples=12, stateful_step_count=6, deadline=None,
                                                     report_multiple_bugs=False, suppress_health_check=list(HealthCheck)))
