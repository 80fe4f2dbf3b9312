"""Keeps rows of `batch` in flight, and writes the responses: in the driver. An actor with an engine of its own hands them on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from pipelines.batch.backend import RequestSettings, Response
from pipelines.batch.backends import open_backend
from pipelines.batch.reader import BatchRow
from pipelines.batch.writer import Output, Writer
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

    def answer(self, rows: Iterable[BatchRow]) -> None:
        """Answer all rows. Rows that were answered are written even when it raises."""
        try:
            with Progress("batch", "rows") as progress:
                for row, response in self.answered(rows):
                    self.writer.add(row, response)
                    progress.advance(1, f"{self.writer.failed} failed" if self.writer.failed else "")
        finally:
            self.writer.flush()

    def answered(self, rows: Iterable[BatchRow]) -> Iterator[tuple[BatchRow, Response]]:
        """Rows with their responses, in the order in which these come."""
        flying: dict[Future[Response], BatchRow] = {}
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            for row in rows:
                flying[pool.submit(self.backend.ask, row)] = row
                if len(flying) >= 2 * self.settings.concurrency:  # one row waits behind each request in flight
                    yield from _taken(flying)
            while flying:
                yield from _taken(flying)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # first, or a thread that `stop` frees begins with another row
            self.backend.stop()  # threads that wait for a server would keep the process alive
            raise
        finally:
            pool.shutdown(wait=False)


def _taken(flying: dict[Future[Response], BatchRow]) -> Iterator[tuple[BatchRow, Response]]:
    """The responses that are there; waits for at least one."""
    done = wait(flying, return_when=FIRST_COMPLETED).done
    for future in sorted(done, key=lambda one: one.exception() is not None):  # answers first, then the one that raises
        yield flying.pop(future), future.result()
