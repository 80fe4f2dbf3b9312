"""Rows through tasks, a pool of actors and tasks again: all of them, once, and faults as one line."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from hydra_core.errors import InputError, StoppedError
from pipelines.config import Workers
from pipelines.runtime.row_flow import Pool, Rows, in_order, run_flow

PARTS = 6
"""Tables that an actor hands on for each that it is given."""


def read(table: pa.Table, fault: str = "") -> Iterator[Rows]:
    for number in table["n"].to_pylist():
        if fault == "read":
            raise InputError("part-x.parquet: cannot be read")
        yield Rows("given", pa.table({"n": [number]}))


def write(rows: Rows, folder: Path, fault: str = "") -> None:
    if fault == "disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    for row in rows.table.to_pylist():
        with (folder / str(row["n"])).open("a") as file:
            file.write(f"{row['by']}\n")


class Worker:
    """Hands on ten numbers for each, cut in order though they come in any; says who it is. It dies once, if it is to."""

    def __init__(self, settings: tuple[str, str]) -> None:
        self.folder, self.fault = Path(settings[0]), settings[1]
        if self.fault == "start":
            raise InputError("base.model=/x: cannot be loaded")

    def __call__(self, given: Rows) -> Iterator[Rows]:
        (number,) = given.table["n"].to_pylist()
        if self.fault == "block" and number == 3:
            raise InputError("row 3: is wrong")
        names = [f"{number}-{at}" for at in range(10 * PARTS)]
        mixed = random.SystemRandom().sample(names, len(names))
        for at, part in enumerate(in_order(((name, name) for name in mixed), names, 10)):
            if self.fault == "death" and at == PARTS - 2 and not (self.folder / "died").exists():
                while not (self.folder / names[10]).exists():  # what was handed on is written
                    time.sleep(0.01)
                (self.folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield Rows("numbers", pa.table({"n": part, "by": [os.getpid()] * len(part)}), {"parts": 1})
        yield Rows("numbers", pa.table({"n": pa.array([], pa.string())}), {"ends": 1})
        if self.fault == "pool":
            time.sleep(1)


def flow(folder: Path, fault: str = "", pool: Pool | None = None, numbers: int = 4) -> dict[str, int]:
    folder.mkdir()
    source = [pa.table({"n": [number, number + 1]}) for number in range(0, numbers, 2)]
    return run_flow(source, partial(read, fault=fault), Worker, (str(folder), fault), partial(write, folder=folder, fault=fault),
                    pool=pool or Pool(Workers(cpus=0.2), 1, 1), storage=folder)


@pytest.mark.parametrize("size", [1, 3, 7, 40])
def test_the_cut_does_not_depend_on_the_order(size: int) -> None:
    order = [f"{number}" for number in range(20)]
    cuts = [list(in_order(((name, int(name)) for name in random.Random(seed).sample(order, 20)), order, size))
            for seed in range(5)]
    assert all(cut == [list(range(20))[at:at + size] for at in range(0, 20, size)] for cut in cuts)


def test_a_part_is_handed_on_as_soon_as_it_can_be() -> None:
    found = iter([("b", 1), ("a", 0), ("d", 3), ("c", 2)])
    parts = in_order(found, "abcd", 2)
    assert next(parts) == [0, 1] and next(found) == ("d", 3)


@pytest.mark.slow
def test_faults_come_out_as_they_went_in(local_ray: None, tmp_path: Path) -> None:
    assert flow(tmp_path / "whole") == {"numbers": 240, "parts": 24, "ends": 4}
    for fault, words in (("read", "part-x.parquet: cannot be read"), ("start", "base.model=/x: cannot be loaded"),
                         ("block", "row 3: is wrong")):
        with pytest.raises(InputError) as caught:
            flow(tmp_path / fault, fault)
        assert str(caught.value) == words
    with pytest.raises(StoppedError, match=r"^the disk is full: .*make room and run the same command again$"):
        flow(tmp_path / "disk", "disk")


@pytest.mark.slow
def test_an_actor_that_is_killed_neither_doubles_nor_loses_a_row(local_ray: None, tmp_path: Path) -> None:
    """Its rows come in another order each time: what was handed on before is exactly what is left out after."""
    folder = tmp_path / "death"
    flow(folder, "death")
    assert (folder / "died").exists()
    found = {path.name: path.read_text().split() for path in folder.iterdir() if path.name != "died"}
    assert found.keys() == {f"{number}-{at}" for number in range(4) for at in range(10 * PARTS)}
    assert {len(by) for by in found.values()} == {1} and len({by[0] for by in found.values()}) == 2


@pytest.mark.slow
def test_actors_that_take_every_cpu_leave_the_tasks_running(local_ray: None, tmp_path: Path) -> None:
    """And the pool grows to its largest size while there is work."""
    assert flow(tmp_path / "full", pool=Pool(Workers(count=2, cpus=1), 2, 2))["numbers"] == 240
    flow(tmp_path / "grown", "pool", Pool(Workers(cpus=1), 1, 2), numbers=24)
    assert len({path.read_text() for path in (tmp_path / "grown").iterdir()}) == 2
    pool = Pool(Workers(cpus=1), 2, 5)
    assert [(one.least, one.most) for one in map(pool.at_most, (0, 1, 3, 9))] == [(1, 1), (1, 1), (2, 3), (2, 5)]
