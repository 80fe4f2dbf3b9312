"""What a replica keeps of its answers, to train on: chosen by request, written by a thread, never in the way of an answer.

    answer -> offer -> queue (bounded) -> thread: redact, collect -> parts of the folder, the oldest of which go
"""

from __future__ import annotations

import importlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from hydra_core.decoding import Result
from hydra_core.errors import InputError
from hydra_core.storage import as_path
from pipelines.config import RunConfig
from pipelines.rows.schemas import content_id, is_in_share
from pipelines.rows.served_records import NEUTRAL, ServedRecord, check_record, prune, write_records
from pipelines.runtime.artifacts import served_folder
from pipelines.runtime.faults import first_line
from pipelines.serve.messages import Generation

WAITING = 1024
"""Answers that wait for the thread at most; further ones are dropped."""
CLOSE_SECONDS = 10.0
Fate = Literal["written", "queue_full", "not_writable", "redacted", "redact_failed"]
"""What became of a chosen answer: written; or dropped, since the queue was full, the folder took nothing, or the hook returned
None, raised or returned something that is no record."""
Hook = Callable[[dict[str, Any]], dict[str, Any] | None]
log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Recording:
    """What is recorded, and where: the settings `serve.record.*` with a folder or URI."""

    folder: str
    share: float
    max_bytes: int
    max_age_days: float
    rows_per_file: int
    seconds: float
    redact: str | None = None

    @staticmethod
    def of(config: RunConfig) -> Recording | None:
        """What `config` asks for; None: nothing. Raises InputError for a hook that cannot be used."""
        record = config.serve.record
        if not record.share:
            return None
        load_hook(record.redact)
        return Recording(**record.model_dump() | {"folder": served_folder(config)})


def load_hook(name: str | None) -> Hook | None:
    """The function `module:function`. Raises InputError, before anything is served, where there is none."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # of whatever the module does when it is imported
        raise InputError(f"serve.record.redact={name}: cannot be used ({first_line(error)}): name a function of a module that is "
                         "installed here and where replicas run") from None
    if not callable(found):
        raise InputError(f"serve.record.redact={name}: is no function")
    hook: Hook = found
    return hook


class Recorder:
    """Keeps the chosen answers of one replica. `decode`: token ids to text, for the hook; `tell`: called with each answer's fate;
    `clock`: Unix time.

    A hook that this process cannot import lets nothing through: what is to be redacted is never written as it is.
    """

    def __init__(self, recording: Recording, decode: Callable[[Sequence[int]], str], tell: Callable[[Fate, int], None],
                 clock: Callable[[], float] = time.time) -> None:
        self._recording, self._decode, self._tell, self._clock = recording, decode, tell, clock
        self._folder = as_path(recording.folder)
        self._writer = content_id(str(id(self)), clock())[:12]
        self._queue: queue.Queue[ServedRecord | None] = queue.Queue(WAITING)
        self._refused = self._hook_failed = False
        self._hook: Hook | None = None
        self._closed = False
        try:
            self._hook = load_hook(recording.redact)
        except InputError as error:
            self._broken_hook(str(error))
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def wants(self, generation: Generation) -> bool:
        """Whether the answers to this request are recorded; its id decides."""
        return is_in_share(content_id(generation.id), self._recording.share)

    def offer(self, record: ServedRecord) -> None:
        """Keep an answer, unless too many wait already. It returns at once."""
        try:
            if not self._closed:
                self._queue.put_nowait(record)
        except queue.Full:
            self._tell("queue_full", 1)

    def close(self) -> None:
        """Write what waits, for at most `CLOSE_SECONDS`, and end."""
        if self._closed:
            return
        self._closed = True
        try:
            self._queue.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        rows: list[ServedRecord] = []
        begun = time.monotonic()
        while True:
            left = begun + self._recording.seconds - time.monotonic() if rows else None
            try:
                found = self._queue.get(timeout=None if left is None else max(0.0, left))
            except queue.Empty:
                rows = self._write(rows)
                continue
            if found is None:
                self._write(rows)
                return
            if (kept := self._redacted(found)) is not None:
                begun = begun if rows else time.monotonic()
                rows.append(kept)
            if len(rows) >= self._recording.rows_per_file:
                rows = self._write(rows)

    def _redacted(self, record: ServedRecord) -> ServedRecord | None:
        """What the hook leaves of a record, None for nothing. The hook sees the texts too, which are not recorded."""
        if self._recording.redact is None:
            return record
        try:
            if self._hook is None:
                raise InputError("the hook was not loaded")
            given = asdict(record) | {"prompt_ids": list(record.prompt_ids), "response_ids": list(record.response_ids),
                                      "accepted": list(record.accepted), "prompt_text": self._decode(record.prompt_ids),
                                      "response_text": self._decode(record.response_ids)}
            left = self._hook(given)
            if left is None:
                self._tell("redacted", 1)
                return None
            kept = check_record({name: value for name, value in left.items() if name not in ("prompt_text", "response_text")})
            changed = (kept.prompt_ids, kept.response_ids) != (record.prompt_ids, record.response_ids)
            return replace(kept, settings=kept.settings | {"redacted": True}) if changed else kept
        except Exception as error:  # of the user's function
            self._tell("redact_failed", 1)
            self._broken_hook(f"serve.record.redact={self._recording.redact}: raises {type(error).__name__}")
            return None

    def _broken_hook(self, why: str) -> None:
        """One line, however often it fails. What the hook raised may hold what it was to take away, so only its type is told."""
        if not self._hook_failed:
            self._hook_failed = True
            log.error(f"{why}: those answers are not recorded")

    def _write(self, rows: list[ServedRecord]) -> list[ServedRecord]:
        """Write a part and remove old ones; returns the rows that wait then: none, whatever happened."""
        if not rows:
            return []
        now = self._clock()
        try:
            write_records(self._folder, rows, now, self._writer)
        except Exception as error:  # a full disk, or whatever a store raises
            self._tell("not_writable", len(rows))
            if not self._refused:
                self._refused = True
                log.error(f"{self._folder}: answers cannot be recorded, and are dropped ({first_line(error)[:200]})")
            return []
        if self._refused:
            self._refused = False
            log.info(f"{self._folder}: answers are recorded again")
        self._tell("written", len(rows))
        try:
            prune(self._folder, self._recording.max_bytes, now - self._recording.max_age_days * 86400)
        except Exception as error:
            log.warning(f"{self._folder}: old records cannot be removed ({first_line(error)[:200]})")
        return []


def record_of(generation: Generation, result: Result, accepted: Sequence[int],
              made_by: tuple[str, str, int | None]) -> ServedRecord:
    """The record of one answer. `made_by`: base, digest of the heads, version."""
    settings = {name: getattr(generation, name) for name, neutral in NEUTRAL.items() if getattr(generation, name) != neutral}
    if generation.speculative != "drafter":
        settings["speculative"] = generation.speculative
    return ServedRecord(round(time.time(), 3), result.prompt_ids, result.token_ids, result.finish_reason, generation.temperature,
                        generation.seed, settings, tuple(accepted), *made_by)
