"""Paths of any storage, against a real S3 server: whole or not at all, created once, fetched once, and patient."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from hydra_core import storage
from hydra_core.errors import InputError, StoppedError
from hydra_core.files import atomic_file, atomic_folder
from hydra_core.storage import as_path, create, is_remote, listing, local_copy, name_in, open_stream, opened, stored
from tests.packages import pretend


def write(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        assert isinstance(temporary, Path) and temporary.read_bytes() == b""
        temporary.write_text(text, encoding="utf-8")


def test_folders_stay_what_they_were(tmp_path: Path) -> None:
    assert as_path(str(tmp_path)) == tmp_path == as_path(f"file://{tmp_path}") == as_path(tmp_path)
    assert as_path("file:///with%20space") == Path("/with space")
    for path in (tmp_path, as_path(f"file://{tmp_path}")):
        assert type(path) is type(Path()) and not is_remote(path) and local_copy(path) is path and opened(path) is path
    assert name_in(tmp_path / "a" / "b", tmp_path) == "a/b" and name_in(tmp_path, tmp_path) == "."


@pytest.mark.parametrize(("uri", "told"), [
    ("ftp://host/x", r"ftp://host/x: `ftp://` is not supported: give a path .* or a URI \(s3://, gs://, abfs://\)"),
    ("s3://key:secret@bucket/x", r"^s3://bucket/x: holds credentials or a port"), ("s3:///x", "names no bucket: write s3://BUCKET/folder"),
    ("file://host/x", "another machine"), ("gs://bucket/x", r"`gs://` needs gcsfs: pip install 'hydra-heads\[gs\]'")])
def test_what_is_no_storage_is_one_line(uri: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "gcsfs", installed=False)
    with pytest.raises(InputError, match=told) as caught:
        as_path(uri)
    assert "\n" not in str(caught.value)


def test_a_file_is_whole_or_not_there(s3: str) -> None:
    path = as_path(f"{s3}/deep/rows.json")
    assert is_remote(path) and is_remote(str(path)) and str(path) == f"{s3}/deep/rows.json"
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert not path.exists() and stored(path) is None and listing(as_path(s3)) == {}
    write(path, "rows")
    again = pickle.loads(pickle.dumps(path))
    assert again.read_text(encoding="utf-8") == "rows" and again == path and name_in(path, as_path(s3)) == "deep/rows.json"
    with open_stream(path) as stream, opened(path) as pieces:
        assert stream.read() == pieces.read() == b"rows"
    first = stored(path)
    write(path, "rowz")  # same size
    second = stored(path)
    assert first and second and first.bytes == second.bytes == 4 and first.tag != second.tag and second.written > 1e9
    assert [str(one) for one in as_path(s3).iterdir()] == [f"{s3}/deep"] and listing(as_path(s3)).keys() == {"deep/rows.json"}


def test_a_folder_is_replaced_with_all_that_was_in_it(s3: str) -> None:
    folder = as_path(f"{s3}/runs/heads")
    for names in (("config.json", "old/x"), ("config.json", "model", "deep/y")):
        with atomic_folder(folder) as temporary:
            for name in names:
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(f"{names}", encoding="utf-8")
    assert listing(folder).keys() == {"config.json", "model", "deep/y"}
    before = listing(folder)
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "model").write_text("half", encoding="utf-8")
        raise RuntimeError
    assert listing(folder) == before
    copy = local_copy(folder)
    assert copy.name == "heads"
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} == before.keys()


def test_what_exists_is_not_created_again(s3: str) -> None:
    path = as_path(f"{s3}/lock")
    create(path, b"first")
    with pytest.raises(FileExistsError):
        create(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_copy_is_fetched_once_for_a_content(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    fetch = storage._fetch
    monkeypatch.setattr(storage, "_fetch", lambda path, *rest: (fetched.append(str(path)), fetch(path, *rest)))
    path = as_path(f"{s3}/model")
    with pytest.raises(InputError, match=f"{s3}/model: no such file or folder"):
        local_copy(path)
    write(path, "one")
    first = local_copy(path)
    assert local_copy(str(path)) == first and first.read_text(encoding="utf-8") == "one" and len(fetched) == 1
    first.write_text("on", encoding="utf-8")  # as a power cut leaves it
    assert local_copy(path).read_text(encoding="utf-8") == "one" and len(fetched) == 2
    write(path, "two")
    second = local_copy(path)
    assert second.read_text(encoding="utf-8") == "two" and first.exists(), "others may read the first one still"
    monkeypatch.setattr(storage, "KEPT_SECONDS", -1)
    write(path, "three")
    assert local_copy(path).read_text(encoding="utf-8") == "three" and not first.exists() and not second.exists()


def test_a_store_that_is_away_is_waited_for(s3: str, s3_server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch,
                                            caplog: pytest.LogCaptureFixture) -> None:
    """The server does not listen, and comes back."""
    caplog.set_level(logging.WARNING, "hydra_core.storage")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client's own, of seconds each
    monkeypatch.setitem(storage.OPTIONS, "skip_instance_cache", True)
    path, slept = as_path(f"{s3}/rows"), []
    port = s3_server.get_host_and_port()[1]
    s3_server.stop()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            s3_server._port = port
            s3_server._server_ready = False
            s3_server.start()

    monkeypatch.setattr(storage.time, "sleep", sleep)
    write(path, "rows")
    assert path.read_text(encoding="utf-8") == "rows" and slept == [1.0, 2.0]
    assert [record.message.split(" (")[0] for record in caplog.records] == [f"{path}: the store takes no writes now"]


def test_patience_ends(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE", 0.5)

    def busy() -> None:
        raise OSError(16, "Please reduce your request rate")

    with pytest.raises(StoppedError, match=r"rows: the store has taken no writes for 0 s \(.*rate\): what stands is whole"):
        storage.persistently(as_path(f"{s3}/rows"), busy)
    with pytest.raises(FileNotFoundError):  # waiting makes no bucket
        write(as_path("s3://no-such-bucket/rows"), "rows")
