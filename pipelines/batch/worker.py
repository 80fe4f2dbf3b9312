"""Keeps rows of `batch` in flight and writes the responses: in the driver, or as a Ray Data actor with an engine of its own."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipelines.batch.backend import RequestSettings, Response
from pipelines.batch.backends import open_backend
from pipelines.batch.reader import BatchRow, read_block
from pipelines.batch.writer import Output, Writer
from pipelines.distill.actors import counts
from pipelines.runtime.console import Progress


@dataclass(frozen=True)
class BatchSettings:
    """The settings of a worker; plain values. `concurrency`: rows in flight."""

    output: Output
    requests: RequestSettings
    concurrency: int


class BatchWorker:
    """Answers rows as they come. It holds the rows in flight and those of the output part that is not full yet."""

    def __init__(self, settings: BatchSettings) -> None:
        self.settings = settings
        self.backend = open_backend(settings.requests)
        self.writer = Writer(settings.output)

    def __call__(self, block: pa.Table) -> pa.Table:
        """As a Ray Data actor: answer the rows of the files in column `path`."""
        before = self.writer.done, self.writer.failed
        for path in block["path"].to_pylist():
            self.answer(read_block(Path(path)))
        return counts(ok=self.writer.done - before[0], errors=self.writer.failed - before[1])

    def answer(self, rows: Iterable[BatchRow]) -> None:
        """Answer all rows. Rows that were answered are written even when it raises."""
        flying: dict[Future[Response], BatchRow] = {}
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            with Progress("batch", "rows") as progress:
                for row in rows:
                    flying[pool.submit(self.backend.ask, row)] = row
                    if len(flying) >= 2 * self.settings.concurrency:  # one row waits behind each request in flight
                        self._take(flying, progress)
                while flying:
                    self._take(flying, progress)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, or a thread that `stop` frees begins with another row
            self.backend.stop()  # threads that wait for a server would keep the process alive
            raise
        finally:
            pool.shutdown(wait=False)
            self.writer.flush()

    def _take(self, flying: dict[Future[Response], BatchRow], progress: Progress) -> None:
        """Write the responses that are there; wait for at least one."""
        done = wait(flying, return_when=FIRST_COMPLETED).done
        for future in sorted(done, key=lambda one: one.exception() is not None):  # answers first, then the one that raises
            self.writer.add(flying.pop(future), future.result())
        progress.advance(len(done), f"{self.writer.failed} failed" if self.writer.failed else "")
