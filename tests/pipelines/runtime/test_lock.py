"""One run at a time: an overlapping one is told who is there, and a dead one is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import Timeout

from hydra_core.errors import InputError
from hydra_core.files import file_lock
from pipelines.runtime.lock import holds, only_run
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from pipelines.runtime.lock import only_run
with only_run(Path(sys.argv[1]), Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_an_overlapping_run_is_told_and_a_dead_one_is_taken_over(storage: Path) -> None:
    folder = storage / "runs" / "default" / "batch"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(storage)], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    try:
        with pytest.raises(InputError, match=rf"another run writes to it \(process {holder.pid} on ") as caught, \
                only_run(folder, storage):
            pass
        assert "\n" not in str(caught.value)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert (folder.parent / ".batch.lock").exists()  # left behind, and worth nothing
    with only_run(folder, storage), pytest.raises(InputError, match=f"process {os.getpid()}"), only_run(folder, storage):
        pass
    assert storage.exists() and not (storage / "runs").exists()


def test_folders_that_hold_something_stay(storage: Path) -> None:
    with only_run(storage / "runs" / "a" / "batch", storage):
        (storage / "runs" / "kept").write_text("", encoding="utf-8")
    assert [path.name for path in (storage / "runs").iterdir()] == ["kept"]
    outside = storage.parent / "out" / "2026-01-31"
    with only_run(outside, storage):
        pass
    assert outside.parent.exists()


def test_a_link_to_a_folder_has_its_lock(storage: Path) -> None:
    (storage / "real").mkdir(parents=True)
    (storage / "link").symlink_to(storage / "real")
    with only_run(storage / "real", storage), pytest.raises(InputError, match="/link: another run writes to it"), \
            only_run(storage / "link", storage):
        pass


def test_the_line_names_the_setting(storage: Path) -> None:
    with only_run(storage / "out", storage), pytest.raises(InputError, match=r"^batch\.output=/.*/out: another run"), \
            only_run(storage / "out", storage, "batch.output"):
        pass


def test_who_holds_a_folder(storage: Path) -> None:
    folder, found = storage / "out", []
    assert not holds(folder)
    with only_run(folder, storage):
        other = threading.Thread(target=lambda: found.append(holds(folder)))
        other.start()
        other.join()
        assert holds(folder) and found == [False]
    assert not holds(folder)


def test_a_lock_that_is_held_is_waited_for_and_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with file_lock(tmp_path / "x.lock"), pytest.raises(Timeout), file_lock(tmp_path / "x.lock", timeout=0):
        pass
    with pytest.raises(OSError, match="broken"), file_lock(tmp_path / "x.lock", timeout=0):
        raise OSError(errno.ENOLCK, "broken")  # the block's own error
    with file_lock(tmp_path / "x.lock", timeout=0):
        pass

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="broken"), file_lock(tmp_path / "x.lock", timeout=0):
        pass


def test_a_file_system_without_locks(storage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch's output needs one, since its rows are dear; a stage of a run worked there before, and warns."""
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with file_lock(storage.parent / "x.lock"), file_lock(storage.parent / "x.lock", timeout=0):  # of what anybody may make again
        pass
    folder = storage / "runs" / "a" / "train"
    with pytest.raises(InputError, match=r"batch\.output=.*: this file system has no locks \(No locks available\): choose"), \
            only_run(folder, storage, "batch.output"):
        pass
    assert capsys.readouterr().err == ""
    with only_run(folder, storage):
        assert holds(folder)
    assert capsys.readouterr().err == (f"storage: {folder}: this file system has no locks (No locks available): see to it that "
                                       "no other run writes there\n")
