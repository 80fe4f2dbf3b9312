"""A user of whom the system knows no name and no home."""

from __future__ import annotations

import getpass
import os
import pwd
from pathlib import Path
from typing import NoReturn

import pytest

from pipelines.runtime import user
from pipelines.runtime.user import complete_user


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No variables of a user, each taken back afterwards, and a private folder that is this test's."""
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    folder = tmp_path / "ray-1"
    folder.mkdir()
    monkeypatch.setattr(user, "private_folder", lambda: folder)
    return folder


def unknown(*_: object) -> NoReturn:
    raise KeyError("getpwuid(): uid not found: 12345")


def test_a_user_without_a_name_and_a_home_gets_both(private: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    with pytest.raises(RuntimeError):
        Path.home()
    complete_user()
    assert getpass.getuser() == f"user-{os.getuid()}" and Path.home() == private / "home" and Path.home().is_dir()
    assert "XDG_CACHE_HOME" not in os.environ
    assert capsys.readouterr().err == f"user: this user has no home folder: libraries keep their caches in {private}/home\n"


@pytest.mark.parametrize("home", ["/proc/nowhere", "file"])
def test_a_home_that_cannot_be_written(private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str], home: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    complete_user()
    assert os.environ["XDG_CACHE_HOME"] == str(private / "home" / ".cache") and os.environ["HOME"] == str(tmp_path / home)
    assert f"{tmp_path / home} cannot be written: libraries keep their caches in" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{}, {"XDG_CACHE_HOME": "/elsewhere"}])
def test_a_user_like_most_keeps_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                           given: dict[str, str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "me")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    complete_user()
    assert dict(os.environ) == before and not capsys.readouterr().err


def test_a_home_that_is_not_made_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "not" / "yet"))
    complete_user()
    assert "XDG_CACHE_HOME" not in os.environ and (tmp_path / "not" / "yet" / ".cache").is_dir()
