"""The ends of the flow through engines, without Ray: blocks of requests, and rows that are cut in one order and written once."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydra_core.errors import StoppedError
from pipelines.batch import engines
from pipelines.batch import worker as batch_worker
from pipelines.batch.backend import RequestSettings, Response
from pipelines.batch.engines import (
    MADE,
    SOURCE,
    TO_ANSWER,
    EngineActor,
    InputReader,
    MadeWriter,
    answer_with_engines,
)
from pipelines.batch.input_digest import input_digest
from pipelines.batch.reader import BatchRow, digest
from pipelines.batch.worker import BatchSettings
from pipelines.batch.writer import BATCH, BATCH_ERRORS, Output, deduplicate, read_batch_rows
from pipelines.config import RunConfig, load_config
from pipelines.runtime.row_flow import Rows
from tests.pipelines.batch.test_worker import Echo

LINES = ['{"prompt": "a", "id": "1"}', '{"x": 1}', '{"prompt": "b", "id": "2"}', '{"prompt": "a", "id": "1"}',
         '{"prompt": "c", "id": "1"}', '{"prompt": "d", "id": "3"}', '{"prompt": "e", "id": "4"}', '{"prompt": "f", "id": "5"}']


class Scattered(Echo):
    """Answers in any order; the row named `fault` stops the job, `refused` is an error."""

    def ask(self, row: BatchRow) -> Response:
        time.sleep(random.SystemRandom().uniform(0, 0.01))
        if row.id == self.fault:
            time.sleep(0.1)
            raise StoppedError("the engine is gone")
        return Response(400, "is refused") if row.id == "refused" else super().ask(row)


def job(folder: Path, lines: list[str] = LINES) -> tuple[RunConfig, BatchSettings]:
    path = folder / "in.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = BatchSettings(Output(str(folder / "out"), "jsonl", "plain", 2), RequestSettings("m", 4, 0.0, 0), 3)
    return load_config(None, {"batch.input": str(path), "batch.rows_per_file": 2}), settings


def reader(config: RunConfig, settings: BatchSettings, known: str = "", wanted: str | None = None) -> InputReader:
    ids = engines.np.frombuffer(b"".join(sorted(map(digest, known))), "u1")
    return InputReader(config, settings.output, wanted or input_digest(config), ids, 2)


def test_requests_come_in_blocks_and_every_row_is_counted(tmp_path: Path) -> None:
    """In the same blocks each time: what has no answer, rows that are none, and the counts."""
    config, settings = job(tmp_path)
    once, again = ([(rows.name, rows.table.to_pylist(), dict(rows.counts)) for rows in reader(config, settings, "4")(SOURCE[0])]
                   for _ in range(2))
    assert once == again
    asked = [[json.loads(row["row"])["id"] for row in table] for name, table, _ in once if name == TO_ANSWER]
    assert asked == [["1", "2"], ["3", "5"]]
    bad = [json.loads(row["row"]) for name, table, _ in once if name == MADE for row in table]
    assert [row["message"].split(":")[0] for row in bad] == ["row 2", "row 5"]
    assert once[-1] == (MADE, [], {"read": 8, "skipped": 1, "changed": 0}) and sum(c.get("refused", 0) for *_, c in once) == 2


def test_an_input_that_changes_is_told_with_the_counts(tmp_path: Path) -> None:
    config, settings = job(tmp_path)
    found = list(reader(config, settings, wanted="another")(SOURCE[0]))
    assert found[-1].counts == {"read": 8, "skipped": 1, "changed": 1}


def engine(monkeypatch: pytest.MonkeyPatch, settings: BatchSettings, fault: str | None = None) -> EngineActor:
    monkeypatch.setattr(batch_worker, "open_backend", lambda _: Scattered(fault))
    return EngineActor(settings)


def block(names: list[str]) -> Rows:
    rows = [engines.asdict(BatchRow(name, number, prompt="a\u2028\u00fc")) for number, name in enumerate(names, start=1)]
    return Rows(TO_ANSWER, engines.pa.table({"row": [json.dumps(row) for row in rows]}))


def test_a_block_is_cut_in_the_same_way_in_whatever_order_its_answers_come(monkeypatch: pytest.MonkeyPatch,
                                                                           tmp_path: Path) -> None:
    """A part of answers alone, of errors alone and of both: as many tables each time."""
    _, settings = job(tmp_path)
    names = [*map(str, range(7)), "refused"]
    cuts = [[[json.loads(text)["id"] for text in rows.table["row"].to_pylist()]
             for rows in engine(monkeypatch, settings)(block(names))] for _ in range(3)]
    assert cuts == [[names[at:at + 2] for at in range(0, 8, 2)]] * 3
    made = Rows(MADE, block(names).table, {"read": 1})
    assert list(engine(monkeypatch, settings)(made)) == [made]
    for rows in engine(monkeypatch, settings)(block(names)):
        MadeWriter(settings.output)(rows)
    found = list(read_batch_rows(settings.output.rows, "jsonl"))
    assert sorted(row["id"] for row in found) == names[:7] and {row["text"] for row in found} == {"a\u2028\u00fc"}
    assert len(deduplicate(settings.output.errors, "jsonl", BATCH_ERRORS).ids) == 1


def test_what_was_answered_is_written_before_the_job_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first row has no answer, so no part of the block is full in its order."""
    _, settings = job(tmp_path)
    with pytest.raises(StoppedError, match="the engine is gone"):
        list(engine(monkeypatch, settings, fault="0")(block(list(map(str, range(6))))))
    assert len(deduplicate(settings.output.rows, "jsonl", BATCH).ids) >= 3


@pytest.mark.parametrize("known", ["12345", ""])
def test_no_engine_starts_for_an_input_without_a_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: str) -> None:
    """But rows that are none are written and counted; else as many engines start as there are blocks for."""
    config, settings = job(tmp_path)
    pools: list[Any] = []
    flow: Callable[..., Any] = lambda *_, pool, **__: pools.append(pool)  # noqa: E731
    monkeypatch.setattr(engines, "run_flow", flow)
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"replicas": 4}),
                                       "batch": config.batch.model_copy(update={"rows_per_file": 2})})
    settings = BatchSettings(settings.output, settings.requests, 0)
    counts = answer_with_engines(config, input_digest(config), settings, set(map(digest, known)))
    if known:
        assert not pools and (counts["read"], counts["skipped"], counts["refused"]) == (8, 1, 2)
        assert len(deduplicate(settings.output.errors, "jsonl", BATCH_ERRORS).ids) == 2
    else:
        assert [(pool.least, pool.most) for pool in pools] == [(4, 4)]
