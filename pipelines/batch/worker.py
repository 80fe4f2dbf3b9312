"""Keeps rows of `batch` in flight and writes what comes of them: in the driver, or as a Ray Data actor with an engine of
its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipelines.batch.backends import RequestSettings, Response, open_backend
from pipelines.batch.reader import BatchRow, read_block
from pipelines.batch.writer import Output, Writer
from pipelines.distill.actors import counts

TELL_SECONDS = 10.0


@dataclass(frozen=True)
class BatchSettings:
    """What a worker is given; plain values. `concurrency`: rows in flight."""

    output: Output
    requests: RequestSettings
    concurrency: int


class BatchWorker:
    """Answers rows as they come, never holding more than are in flight and a part not yet full."""

    def __init__(self, settings: BatchSettings) -> None:
        self.settings = settings
        self.backend = open_backend(settings.requests)
        self.writer = Writer(settings.output)
        self._told = time.monotonic()

    def __call__(self, block: pa.Table) -> pa.Table:
        """As a Ray Data actor: the rows of the files in column `path`."""
        before = self.writer.done, self.writer.failed
        for path in block["path"].to_pylist():
            self.answer(read_block(Path(path)))
        return counts(ok=self.writer.done - before[0], errors=self.writer.failed - before[1])

    def answer(self, rows: Iterable[BatchRow]) -> None:
        """Answer all rows. Whatever is raised, rows that were answered are written."""
        flying: dict[Future[Response], BatchRow] = {}
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            for row in rows:
                flying[pool.submit(self.backend.ask, row)] = row
                if len(flying) >= 2 * self.settings.concurrency:  # one row waits behind each that is asked
                    self._take(flying)
            while flying:
                self._take(flying)
        except BaseException:
            self.backend.retry_policy.over = True  # threads that wait for a server would hold the process
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.writer.flush()

    def _take(self, flying: dict[Future[Response], BatchRow]) -> None:
        """Write those that are done; wait for one at least."""
        done = wait(flying, return_when=FIRST_COMPLETED).done
        for future in sorted(done, key=lambda one: one.exception() is not None):  # what was answered before what raises
            self.writer.add(flying.pop(future), future.result())
        if time.monotonic() - self._told > TELL_SECONDS:
            self._told = time.monotonic()
            print(f"batch: {self.writer.done} rows answered, {self.writer.failed} failed", file=sys.stderr, flush=True)
