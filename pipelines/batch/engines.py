"""The flow of rows of `batch` with engines of its own: read and sorted by a task, answered by actors, written by tasks.

    input -> requests without an answer yet, in blocks -> engines -> parts of rows/ and errors/
          -> rows that are no request                             -> parts of errors/
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import pyarrow as pa

from hydra_core.errors import InputError, StoppedError
from pipelines.batch.input_digest import InputChanged, unchanged_rows
from pipelines.batch.reader import BadRow, BatchRow, Reading, digest, ordered, read_rows
from pipelines.batch.worker import BatchSettings, BatchWorker
from pipelines.batch.writer import Made, Output, Writer, answered, refused
from pipelines.config import RunConfig
from pipelines.runtime.console import Progress
from pipelines.runtime.ray_cluster import environment_options
from pipelines.runtime.row_flow import Pool, Rows, in_order, run_flow

TO_ANSWER, MADE = "to answer", "made"
"""Requests, and rows of the output, each with whether it is an answer."""
ID_BYTES = 16
SOURCE = [pa.table({"input": [0]})]
"""One task reads all of the input: whether a row repeats another one is known to nobody else."""


def answer_with_engines(config: RunConfig, digest_of_input: str, settings: BatchSettings, known: set[bytes]) -> Counter[str]:
    """Answer the rows of the input whose ids are not `known`. Returns counts: rows `read`, `skipped` and `refused`, rows `made`,
    and whether the input has `changed`. Raises InputError and StoppedError as the engines do."""
    size = max(config.batch.rows_per_file, 8 * settings.concurrency)
    workers, most = config.serve.workers, config.serve.replicas
    ids = np.frombuffer(b"".join(sorted(known)), np.uint8)
    reader, writer = InputReader(config, settings.output, digest_of_input, ids, size), MadeWriter(settings.output)
    wanted = (row for row in read_rows(config) if isinstance(row, BatchRow) and digest(row.id) not in known)
    blocks = -(-sum(1 for _ in islice(wanted, size * most)) // size)
    with Progress("batch", "rows") as progress:
        def done(counts: Mapping[str, int]) -> None:
            progress.advance(counts.get(MADE, 0))

        if blocks == 0:  # no engine has anything to do
            return _here(reader, writer)
        return run_flow(SOURCE, reader, EngineActor, settings, writer, storage=settings.output.root, done=done, here=True,
                        pool=Pool(workers, most, most, environment_options(config)).at_most(blocks))


def _here(reader: InputReader, writer: MadeWriter) -> Counter[str]:
    """The flow in this process, of an input without a request that is to be answered."""
    counts: Counter[str] = Counter()
    for rows in reader(SOURCE[0]):
        writer(rows)
        counts.update({rows.name: len(rows.table)} | dict(rows.counts))
    return counts


@dataclass(frozen=True)
class InputReader:
    """Reads the whole input. `digest`: of the input when the job began; `known`: [16 n] bytes, digests of the ids that have an
    answer; `block_rows`: requests in one block, which an engine answers together."""

    config: RunConfig
    output: Output
    digest: str
    known: np.ndarray
    block_rows: int

    def __call__(self, _: pa.Table) -> Iterator[Rows]:
        raw, bad, changed = self.known.tobytes(), list[BadRow](), list[str]()
        known = {raw[at:at + ID_BYTES] for at in range(0, len(raw), ID_BYTES)}
        reading = Reading(bad.append)
        requests = ordered(reading.todo(_until_changed(unchanged_rows(self.config, self.digest), changed), known))
        while block := list(islice(requests, self.block_rows)):
            yield Rows(TO_ANSWER, pa.table({"row": [json.dumps(asdict(row)) for row in block]}))
            yield from self._refused(bad, self.output.rows_per_file)
        yield from self._refused(bad, 1)
        yield _made([], read=reading.rows, skipped=reading.skipped, changed=len(changed))

    def _refused(self, bad: list[BadRow], least: int) -> Iterator[Rows]:
        """Rows of the errors file for those in `bad`, if there are so many, in parts; they are forgotten then."""
        while len(bad) >= least:
            part = bad[:self.output.rows_per_file]
            del bad[:len(part)]
            yield _made([refused(self.output, row) for row in part], refused=len(part))


def _until_changed(rows: Iterable[BatchRow | BadRow], changed: list[str]) -> Iterator[BatchRow | BadRow]:
    """The same rows; that the input is another one now is noted in `changed`."""
    try:
        yield from rows
    except InputChanged as error:
        changed.append(str(error))


class EngineActor:
    """Answers blocks of requests with an engine of its own; rows that are made already pass through."""

    def __init__(self, settings: BatchSettings) -> None:
        self.output, self.worker = settings.output, BatchWorker(settings)

    def __call__(self, given: Rows) -> Iterator[Rows]:
        if given.name == MADE:
            yield given
            return
        rows = [BatchRow(**json.loads(text)) for text in given.table["row"].to_pylist()]
        waiting: dict[str, Made] = {}

        def found() -> Iterator[tuple[str, str]]:
            for row, response in self.worker.answered(rows):
                waiting[row.id] = answered(self.output, row, response)
                yield row.id, row.id

        try:
            for part in in_order(found(), [row.id for row in rows], self.output.rows_per_file):
                yield _made([waiting.pop(name) for name in part])
        except (InputError, StoppedError):
            MadeWriter(self.output)(_made(list(waiting.values())))  # the flow ends: what waits would be lost on its way
            raise


@dataclass(frozen=True)
class MadeWriter:
    """Writes rows of the output as a part of `rows/` and one of `errors/`."""

    output: Output

    def __call__(self, rows: Rows) -> None:
        writer = Writer(self.output)
        for row in rows.table.to_pylist():
            writer.put((row["is_answer"], json.loads(row["row"])))
        writer.flush()


def _made(rows: Sequence[Made], **counts: int) -> Rows:
    table = pa.table({"is_answer": pa.array([one for one, _ in rows], pa.bool_()),
                      "row": pa.array([json.dumps(row) for _, row in rows], pa.large_string())})
    return Rows(MADE, table, counts)
