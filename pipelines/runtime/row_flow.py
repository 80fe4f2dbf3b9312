"""Rows that stream through Ray Data: read by tasks, worked on by a pool of actors, written by tasks.

    source -> read(table) -> actor(rows) -> write(rows) -> counts, summed by the driver, which sees no row

What the stages hand on is packed: a table becomes one row of Ray Data, which so neither joins nor splits it. An actor that dies
is started again and repeats its work, of which Ray takes what it has not taken yet, by number. So a function that hands on
several tables must cut its rows in the same way in each repetition, in whatever order they become ready (`in_order`).
Tasks reserve no CPU: where the actors take every one, they run nevertheless.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data

from hydra_core.errors import InputError, StoppedError
from pipelines.config import Workers
from pipelines.runtime.faults import one_line

_MISTAKE, _STOPPED = "mistake", "stopped"
_PACKED = pa.schema([("name", pa.string()), ("rows", pa.large_binary()), ("counts", pa.string())])
NODE_LABEL = "ray.io/node-id"
"""The label that Ray gives to each node."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class Rows:
    """Rows on their way: `name` says what they are, `counts` what else is to be summed when they are written."""

    name: str
    table: pa.Table
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pool:
    """The actors of a flow: `least` to `most` of them, as there is work, each with what `workers` reserves.

    `options`: further ones of Ray for actors and tasks; `lasting` False: tasks take their place, at most `most` at once, which
    make what an actor is for each table anew.
    """

    workers: Workers
    least: int
    most: int
    options: Mapping[str, Any] = field(default_factory=dict)
    lasting: bool = True

    def at_most(self, count: int) -> Pool:
        """The same pool with no more actors than `count`, but one."""
        most = max(1, min(self.most, count))
        return replace(self, least=min(self.least, most), most=most)


def run_flow(source: Sequence[pa.Table], read: Callable[[pa.Table], Iterable[Rows]], actor: Callable[[Any], Any], settings: Any,
             write: Callable[[Rows], object], *, pool: Pool, storage: Path, here: bool = False,
             done: Callable[[Mapping[str, int]], None] | None = None) -> Counter[str]:
    """Send `source` through `read`, actors `actor(settings)` and `write`; returns sums of the counts, and of the rows by name.

    `source`: each table is read by one task; an actor is called with the `Rows` of one reading and yields others; `storage`:
    where `write` writes; `here`: `read` runs on the driver's node, where a user's file may be that no other one has; `done` is
    called with the counts of each table that was written. Raises the InputError or StoppedError of any of the three, and
    StoppedError for a disk that takes no more.
    """
    totals: Counter[str] = Counter()
    if not source:
        return totals
    ray.data.DataContext.get_current().enable_progress_bars = done is None and sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    tasks = {"num_cpus": 0, "batch_format": "pyarrow", "compute": ray.data.TaskPoolStrategy(size=-(-pool.most // 2)),
             **pool.options}
    flow: ray.data.Dataset = ray.data.from_arrow(list(source))
    flow.context.target_max_block_size = 1  # a packed table is a block of its own, and handed on at once
    reading = dict(tasks)
    if here:
        reading["label_selector"] = {NODE_LABEL: ray.get_runtime_context().get_node_id()}
    flow = flow.map_batches(_reading(read, storage), batch_size=None, **reading)
    work: Any = _Actor if pool.lasting else _passing
    flow = flow.map_batches(
        work, batch_size=1, batch_format="pyarrow", num_cpus=pool.workers.cpus,
        num_gpus=pool.workers.gpus, **_compute(pool, (actor, settings, storage)), **pool.options)
    flow = flow.map_batches(_writing(write, storage), batch_size=None, **tasks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")  # more than there is work for: no matter
        for row in flow.iter_rows():
            found = json.loads(row["counts"])
            if row["name"] in (_MISTAKE, _STOPPED):
                raise (InputError if row["name"] == _MISTAKE else StoppedError)(found)
            totals.update(found)
            if done is not None:
                done(found)
    return totals


def in_order(found: Iterable[tuple[str, Found]], order: Sequence[str], size: int) -> Iterator[list[Found]]:
    """Values by the names in `order`, `size` at a time and the rest, whichever is found first; each list once it is full."""
    waiting: dict[str, Found] = {}
    part: list[Found] = []
    at = 0
    for name, value in found:
        waiting[name] = value
        while at < len(order) and order[at] in waiting:
            part.append(waiting.pop(order[at]))
            at += 1
            if len(part) == size:
                yield part
                part = []
    if part:
        yield part


def _reading(read: Callable[[pa.Table], Iterable[Rows]], storage: Path) -> Callable[[pa.Table], Iterator[pa.Table]]:
    return lambda table: _told(lambda: map(_packed, read(table)), storage)


def _writing(write: Callable[[Rows], object], storage: Path) -> Callable[[pa.Table], Iterator[pa.Table]]:
    def written(rows: Rows) -> pa.Table:
        if len(rows.table):
            write(rows)
        return _message(rows.name, None, Counter({rows.name: len(rows.table)}) + Counter(rows.counts))

    return lambda table: _each(table, lambda rows: [written(rows)], storage)


def _compute(pool: Pool, given: tuple[Any, ...]) -> dict[str, Any]:
    """How Ray Data runs the middle of the flow; `given`: arguments of `_Actor`."""
    if pool.lasting:
        return {"compute": ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most), "fn_constructor_args": given}
    return {"compute": ray.data.TaskPoolStrategy(size=pool.most), "fn_args": given}


def _passing(table: pa.Table, actor: Callable[[Any], Any], settings: Any, storage: Path) -> Iterator[pa.Table]:
    """A task in the place of an actor."""
    yield from _Actor(actor, settings, storage)(table)


class _Actor:
    """An actor of the pool. What it is mistaken about it hands on: raised, it would be lost in pages of a traceback."""

    def __init__(self, actor: Callable[[Any], Any], settings: Any, storage: Path) -> None:
        self.storage = storage
        self.fault: pa.Table | None = None
        try:
            with one_line(storage):
                self.actor = actor(settings)
        except (InputError, StoppedError) as error:
            self.fault = _fault(error)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        if self.fault is None:
            yield from _each(table, lambda rows: map(_packed, self.actor(rows)), self.storage)
        else:
            yield self.fault


def _each(messages: pa.Table, work: Callable[[Rows], Iterable[pa.Table]], storage: Path) -> Iterator[pa.Table]:
    """What `work` makes of each message; a fault is handed on."""
    for at in range(len(messages)):
        message = messages.slice(at, 1)
        if message["name"][0].as_py() in (_MISTAKE, _STOPPED):
            yield message
        else:
            yield from _told(partial(work, _unpacked(message)), storage)


def _told(work: Callable[[], Iterable[pa.Table]], storage: Path) -> Iterator[pa.Table]:
    """What `work` makes, and in the end the InputError or StoppedError that it comes to, packed."""
    try:
        with one_line(storage):
            yield from work()
    except (InputError, StoppedError) as error:
        yield _fault(error)


def _fault(error: InputError | StoppedError) -> pa.Table:
    return _message(_MISTAKE if isinstance(error, InputError) else _STOPPED, None, str(error))


def _packed(rows: Rows) -> pa.Table:
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, rows.table.schema) as writer:
        writer.write_table(rows.table)
    return _message(rows.name, stream.getvalue(), dict(rows.counts))


def _message(name: str, rows: pa.Buffer | None, counts: Any) -> pa.Table:
    column = pa.nulls(1, pa.large_binary()) if rows is None else pa.Array.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, rows.size])), rows])
    return pa.table([[name], column, [json.dumps(counts)]], schema=_PACKED)


def _unpacked(message: pa.Table) -> Rows:
    with pa.ipc.open_stream(message["rows"][0].as_buffer()) as reader:
        return Rows(message["name"][0].as_py(), reader.read_all(), json.loads(message["counts"][0].as_py()))
