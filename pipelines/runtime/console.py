"""Progress of a stage on stderr: lines, and a bar where stderr is a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LINE_SECONDS = 5.0
"""Time between two lines of progress where stderr is no terminal."""


def say(stage: str, text: str) -> None:
    """One line on stderr: `stage: text`."""
    sys.stderr.write(f"{stage}: {text}\n")
    sys.stderr.flush()


class Progress:
    """Progress of some work: a bar on a terminal, elsewhere a line every few seconds and one at the end.

        with Progress("distill", "answers", total=200) as progress:
            progress.advance(8, "1,200 tokens/s")

    `total`: None if it is not known. `done`: what an earlier run has finished.
    """

    def __init__(self, stage: str, what: str, total: int | None = None, done: int = 0) -> None:
        self.stage, self.what, self.total, self.done = stage, what, total, done
        self._shown = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                       TimeRemainingColumn())
            # refreshed by `advance` alone: a thread that draws would disturb what is being timed
            self._bar = Progress(*columns, console=Console(file=sys.stderr), auto_refresh=False)
            self._task = self._bar.add_task(f"{self.stage}: {self.what}", total=self.total, completed=self.done, note="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line("")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more as done; `note`: further text, for instance a rate."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note, refresh=True)
        elif time.monotonic() - self._shown >= LINE_SECONDS:
            self._line(note)

    def _line(self, note: str) -> None:
        of = "" if self.total is None else f" of {self.total:,}"
        say(self.stage, f"{self.done:,}{of} {self.what}" + (f", {note}" if note else ""))
        self._shown = time.monotonic()
