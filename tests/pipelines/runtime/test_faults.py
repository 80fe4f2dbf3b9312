"""What takes no more, in one line: full disks, missing permissions, read-only storages, however wrapped."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
import ray.exceptions

from hydra_core.errors import InputError, StoppedError
from pipelines.runtime.faults import find_cause, one_line, storage_fault
from tests.conftest import ROOT
from tests.hosts import small_disk


def wrapped(error: Exception) -> Exception:
    """As an exception arrives that left a Ray task."""
    return ray.exceptions.RayTaskError("measure", "Traceback ...", error).as_instanceof_cause()


class Failures(Exception):
    """As Ray Train has them."""

    def __init__(self, **failures: Exception) -> None:
        super().__init__("Training failed due to worker errors")
        self.worker_failures = failures


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),  # pyarrow
    RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    RuntimeError("Error while serializing: IoError(Os { code: 28, message: \"No space left on device\" })"),
    wrapped(OSError(errno.ENOSPC, "No space left on device")), Failures(rank0=OSError(errno.ENOSPC, "No space left on device")),
], ids=lambda error: type(error).__name__)
def test_a_full_disk_names_the_folder_and_what_is_left(error: Exception, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3 << 19})())
    found = storage_fault(error, tmp_path / "not" / "there")
    assert re.fullmatch(rf"the disk is full: {re.escape(str(tmp_path))} has 1\.5 MiB left.*make room and run the same command "
                        "again", str(found))


def test_a_quota_on_a_disk_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 9 << 30})())
    found = storage_fault(OSError(errno.EFBIG, "File too large"), tmp_path)
    assert f"a file could not grow in {tmp_path}, though 9216 MiB are free (a quota" in str(found)


def test_missing_permissions_name_the_file(tmp_path: Path) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "runs"))
    assert str(storage_fault(wrapped(denied), tmp_path)).startswith(f"{tmp_path}/runs: permission denied: ")
    locked = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "x"))
    assert str(storage_fault(locked, tmp_path)).startswith(f"{tmp_path}/x: a read-only file system: ")
    assert "read-only" in str(storage_fault(RuntimeError("attempt to write a readonly database"), tmp_path))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_file_system_that_fails_is_named(tmp_path: Path, code: int) -> None:
    assert str(storage_fault(wrapped(OSError(code, os.strerror(code), "/net/rows")), tmp_path)).startswith(
        f"/net/rows: the file system failed ({os.strerror(code)}): ")
    assert str(storage_fault(OSError(code, os.strerror(code)), tmp_path)).startswith(f"{tmp_path}: the file system failed")


@pytest.mark.parametrize("error", [ValueError("x"), FileNotFoundError(errno.ENOENT, "No such file", "x"), KeyError(28)])
def test_other_faults_keep_their_traceback(error: Exception, tmp_path: Path) -> None:
    assert storage_fault(error, tmp_path) is None and find_cause(error) is None
    with pytest.raises(type(error)), one_line(tmp_path):
        raise error


def test_a_mistake_stays_one_and_a_full_disk_becomes_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 3"), one_line(tmp_path):
        raise InputError("row 3")
    with pytest.raises(StoppedError, match="the disk is full"), one_line(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_cause_is_found_behind_what_ray_wraps_it_in() -> None:
    assert str(find_cause(Failures(rank1=wrapped(StoppedError("full"))))) == "full"
    assert str(find_cause(wrapped(InputError("row 3")))) == "row 3"


@pytest.mark.slow
def test_a_command_with_a_storage_that_takes_no_more(tiny_base_dir: Path, tmp_path: Path, worker_env: dict[str, str]) -> None:
    """A small disk, which a part of the prompts does not fit on any more."""
    prompts, storage = tmp_path / "prompts.jsonl", tmp_path / "storage"
    draw = random.Random(0)
    prompts.write_text("".join(json.dumps({"prompt": "".join(draw.choices(string.ascii_letters, k=800))}) + "\n"
                               for _ in range(12000)), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.distill", f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32",
               "prompts.source=jsonl", f"prompts.path={prompts}", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    storage.mkdir()
    with small_disk(storage, 4):
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **worker_env}, capture_output=True, text=True, timeout=300)
        left = list(tmp_path.glob("storage/**/*.part"))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and f"error: the disk is full: {storage}" in done.stderr, done.stderr
    assert not left
