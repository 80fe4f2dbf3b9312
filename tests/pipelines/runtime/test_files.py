"""What is written appears whole or not at all, readable as the umask allows; tables and figures follow from it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hydra_core import files
from pipelines.runtime.console import Progress
from pipelines.runtime.figures import new_figure, save_figure
from pipelines.runtime.files import atomic_file, atomic_folder, write_array, write_text
from pipelines.runtime.tables import Table


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "text", "é")
    write_array(tmp_path / "array.npy", np.arange(3))
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("x")
    assert {mode(tmp_path / name) for name in ("text", "array.npy", "folder/inside")} == {0o666 & ~umask}
    assert mode(tmp_path / "folder") == 0o777 & ~umask
    assert (tmp_path / "text").read_bytes() == "é".encode() and np.load(tmp_path / "array.npy").tolist() == [0, 1, 2]


def test_a_writer_that_fails_leaves_what_was(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as folder:
        (folder / "inside").write_text("half")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "inside").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / name).write_text(name)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(("method", "speed"), [("plain", "1.00x"), ("hydra", "1.50x")], "Speeds")
    assert table.markdown() == "| method | speed |\n|---|---|\n| plain | 1.00x |\n| hydra | 1.50x |\n"
    table.show()
    shown = capsys.readouterr().err
    assert "Speeds" in shown and "1.50x" in shown
    with pytest.raises(ValueError, match="1 cells do not fit 2 columns"):
        Table(("a", "b"), [("c",)])


def test_figures(tmp_path: Path) -> None:
    figure = new_figure(2, 1)
    figure.subplots().plot([1, 2])
    save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("total", [None, 1200])
def test_progress_in_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                                      total: int | None) -> None:
    monkeypatch.setattr("pipelines.runtime.console.LINE_SECONDS", 0.0)
    with Progress("distill", "answers", total) as progress:
        progress.advance(1000, "7 tokens/s")
    of = " of 1,200" if total else ""
    assert capsys.readouterr().err.splitlines() == [f"distill: 1,000{of} answers, 7 tokens/s", f"distill: 1,000{of} answers"]


def test_progress_is_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("distill", "answers", 4) as progress:
        progress.advance(4)
    shown = capsys.readouterr().err
    assert "distill: answers" in shown and "4/4" in shown


def test_what_a_name_leads_to_is_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of new folders first, then the content, then the name of the file."""
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    write_text(tmp_path / "a" / "b" / "file", "x")
    outer, inner, content, last = synced
    assert {outer, inner} == {tmp_path, tmp_path / "a"} and content.parent == last == tmp_path / "a" / "b"
    assert content.name.startswith(".file.") and not content.exists()


def test_a_folder_above_need_not_be_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is only passed through or written to: the names in it cannot be waited for, a file's content has to be."""
    opening = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags == os.O_RDONLY and refused(Path(path)):
            raise PermissionError(13, "Permission denied", str(path))
        return opening(path, flags, *rest)

    monkeypatch.setattr(files.os, "open", refuse)
    refused = Path.is_dir
    write_text(tmp_path / "a" / "b" / "file", "x")
    with atomic_folder(tmp_path / "c" / "folder") as folder:
        (folder / "inside").write_text("x")
    assert (tmp_path / "a" / "b" / "file").read_text() == (tmp_path / "c" / "folder" / "inside").read_text() == "x"
    refused = Path.is_file
    with pytest.raises(PermissionError):
        write_text(tmp_path / "file", "x")
    assert not (tmp_path / "file").exists()
