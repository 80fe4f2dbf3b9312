"""One run at a time on an object store: the second is told who is there, a dead one is in nobody's way, clocks play no part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import as_path, create, listing
from pipelines.runtime import lease
from pipelines.runtime.lock import check_held, holds, only_run
from tests.conftest import ROOT

HOLD = """
import sys, time
from hydra_core.storage import as_path
from pipelines.runtime.lock import only_run
with only_run(as_path(sys.argv[1]), as_path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def until(there: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_overlapping_run_is_told_and_a_dead_one_is_taken_over(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = as_path(f"{s3}/runs/default/batch")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), s3], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        line = rf"batch\.output={folder}: another run writes to it \(process {holder.pid} on "
        with pytest.raises(InputError, match=line) as told, only_run(folder, as_path(s3), "batch.output"):
            pass
        assert "\n" not in str(told.value)
    finally:
        holder.kill()
        holder.wait()
    elsewhere = "another machine"
    with monkeypatch.context() as patch:  # there the process cannot be seen: its lease must end first
        patch.setattr(lease, "_machine", lambda: elsewhere)
        with pytest.raises(InputError, match="another run writes to it"), only_run(folder, as_path(s3)):
            pass
        patch.setattr(lease, "LEASE", -1.0)
        with only_run(folder, as_path(s3)):
            assert holds(folder) and listing(lease.lease_folder(folder)).keys() == {"000002"}
    with only_run(folder, as_path(s3)):
        assert listing(lease.lease_folder(folder)).keys() == {"000001"}
    assert listing(as_path(s3)) == {} and not holds(folder)


def test_on_its_own_machine_a_dead_run_is_not_waited_for(s3: str) -> None:
    folder = as_path(f"{s3}/out")
    no_process = 2**22 + 1  # above the largest number of one
    about = {"pid": no_process, "host": "here", "machine": lease._machine(), "since": "then"}
    create(lease.lease_folder(folder) / "000007", json.dumps(about).encode())
    with only_run(folder, as_path(s3)):
        assert listing(lease.lease_folder(folder)).keys() == {"000008"}


def test_a_clock_that_is_an_hour_late_or_early_changes_nothing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = as_path(f"{s3}/out")
    monkeypatch.setattr(lease, "_machine", lambda: os.urandom(4).hex())
    with only_run(folder, as_path(s3)):
        for hours in (-1, 1):
            with monkeypatch.context() as patch, pytest.raises(InputError, match="another run"):
                real = time.time
                patch.setattr(lease.time, "time", lambda real=real, hours=hours: real() + 3600 * hours)
                with only_run(folder, as_path(s3)):
                    pass


def test_of_many_runs_that_begin_at_once_one_holds(s3: str) -> None:
    folder, held, refused = as_path(f"{s3}/out"), [], []
    begin, end = threading.Barrier(6), threading.Event()

    def run() -> None:
        begin.wait()
        try:
            with lease.leased(folder, "out") as own:
                held.append(own)
                end.wait(20)
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(held) + len(refused) == 6)
    end.set()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 5 and listing(as_path(s3)) == {}


def test_a_lease_is_renewed_and_one_that_was_taken_over_ends_the_run(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.05)
    folder = as_path(f"{s3}/out")
    place: Path = lease.lease_folder(folder)
    with only_run(folder, as_path(s3)):
        first = listing(place)["000001"].tag
        until(lambda: listing(place)["000001"].tag != first)
        check_held(folder)
        create(place / "000002", b"{}")  # of a run that saw the first one end: this process slept
        until(lambda: not _held(folder))
        with pytest.raises(StoppedError, match="another run has taken over"):
            check_held(folder)
    assert listing(place).keys() >= {"000002"}


def _held(folder: Path) -> bool:
    try:
        check_held(folder)
    except StoppedError:
        return False
    return True
