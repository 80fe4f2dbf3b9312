"""Paths of any storage: folders that every node sees, and object stores by URI.

`as_path` makes a path of a setting. A folder or `file://` gives a `pathlib.Path`, and everything is as it always was. `s3://`,
`gs://` and `abfs://` give a path of universal_pathlib, which has the methods of pathlib over fsspec. These two are chosen because
one path can then go through all code; transformers, `datasets` and Ray know fsspec already; and its libraries for S3, Google and
Azure rest on the stores' own clients, which read the usual environment variables, profiles and roles. pyarrow.fs cannot create an
object on condition, on which locks rest; obstore reads no profiles, and Ray does not take it.

An object appears whole or not at all, and a killed upload leaves nothing that a listing shows. What must be a file, because it is
mapped or read by a C library, is fetched once a machine (`local_copy`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any, TypeVar, cast
from urllib.parse import unquote, urlsplit

from hydra_core.errors import InputError, StoppedError

LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}
"""Scheme -> the library that fsspec needs for it. The extra of this package that installs it has the scheme's name."""
OPTIONS: dict[str, Any] = {"use_listings_cache": False}
"""Of every store: other processes write there, and a remembered listing would hide what they have written."""
BLOCK = 8 << 20
"""Bytes that are read ahead of a text."""
CACHE_VARIABLE = "HYDRA_HEADS_CACHE"
KEPT_SECONDS = 3600.0
"""For which an earlier copy of what has changed in the store stays."""
PATIENCE = 300.0
"""Seconds for which a store may refuse writes before a run ends."""
LONGEST_WAIT = 15.0
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "adlfs", "azure", "asyncio", "fsspec")
"""Modules whose exceptions tell of a store or of the way to it."""
log = logging.getLogger(__name__)
Result = TypeVar("Result")


def scheme_of(text: str) -> str | None:
    """`s3` of `s3://bucket/x`; None for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    return found[1].lower() if found else None


def without_keys(text: str) -> str:
    """A URI as it may be shown: without what stands before `@`."""
    return re.sub(r"//[^/@]*@", "//", text)


def check_scheme(text: str) -> str:
    """`text`, a path or a URI, in the form in which it is kept: `file://` becomes a path. Raises ValueError, which says what to
    do, for a scheme that is not supported, for one whose library is missing, and for credentials in a URI."""
    scheme = scheme_of(text)
    if scheme is None:
        return text
    parts = urlsplit(text)
    if scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ValueError("file:// names another machine: write file:///folder, with three slashes")
        return unquote(parts.path)
    if (library := LIBRARIES.get(scheme)) is None:
        raise ValueError(f"`{scheme}://` is not supported: give a path of a file system that every node sees, or a URI "
                         f"({', '.join(f'{one}://' for one in LIBRARIES)})")
    if ":" in parts.netloc or ("@" in parts.netloc and scheme != "abfs"):  # abfs://CONTAINER@ACCOUNT... is no secret
        raise ValueError("holds credentials or a port: give those in the environment")
    if not parts.netloc:
        raise ValueError(f"names no bucket: write {scheme}://BUCKET/folder")
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"`{scheme}://` needs {library}: pip install 'hydra-heads[{scheme}]'")
    return text.rstrip("/")


def as_path(text: str | Path) -> Path:
    """The path of a setting: a `pathlib.Path`, or for a URI of an object store one with the same methods. Raises InputError for a
    URI that `check_scheme` refuses."""
    if not isinstance(text, str) or scheme_of(text) is None:
        return Path(text) if isinstance(text, str) else text
    try:
        kept = check_scheme(text)
    except ValueError as error:
        raise InputError(f"{without_keys(text)}: {error}") from None
    if not is_remote(kept):
        return Path(kept)
    from upath import UPath

    for client in CLIENTS:  # they tell at each start where they have found their credentials
        if logging.getLogger(client).level == logging.NOTSET:
            logging.getLogger(client).setLevel(logging.WARNING)
    return cast(Path, UPath(kept, **OPTIONS))


def is_remote(path: str | Path) -> bool:
    """Whether this is a path of an object store."""
    return scheme_of(path) in LIBRARIES if isinstance(path, str) else not isinstance(path, PurePath)


def name_in(path: Path, folder: Path) -> str:
    """The name of `path` below `folder`; `.` for the folder itself."""
    if not is_remote(path):
        return path.relative_to(folder).as_posix()
    key, above = _key(path), _key(folder).rstrip("/")
    return key.removeprefix(f"{above}/") if key != above else "."


def opened(path: Path) -> Any:
    """What Parquet readers take: the path of a file, or an object that is opened for reading in the pieces that are asked for."""
    return _files(path).open(_key(path), "rb", cache_type="none") if is_remote(path) else path


def open_stream(path: Path) -> IO[bytes]:
    """A file or an object, opened to be read from its beginning to its end."""
    if not is_remote(path):
        return path.open("rb")
    return cast(IO[bytes], _files(path).open(_key(path), "rb", block_size=BLOCK))


@dataclass(frozen=True)
class Stored:
    """An object: its size in bytes, the tag that the store gave to this content, and when it was written by the store's clock
    (seconds since 1970, 0 where the store does not say)."""

    bytes: int
    tag: str
    written: float = 0.0


def listing(folder: Path) -> dict[str, Stored]:
    """Every object below `folder`, by its name there, from one listing; none where there is no such folder."""
    root = _key(folder).rstrip("/") + "/"
    found = _files(folder).find(root, detail=True)
    return {name.removeprefix(root): _stored(about) for name, about in sorted(found.items())
            if about["type"] == "file" and name.startswith(root)}


def stored(path: Path) -> Stored | None:
    """What the store says about one object; None where there is none."""
    try:
        about = _files(path).info(_key(path))
    except FileNotFoundError:
        return None
    return _stored(about) if about["type"] == "file" else None


def upload(source: Path, target: Path) -> None:
    """Write the file `source` as the object `target`, whole or not at all. Waits for a store that refuses writes.

    Raises StoppedError where it does so for `PATIENCE` seconds.
    """
    persistently(target, lambda: _files(target).put_file(str(source), _key(target)))


def upload_folder(source: Path, target: Path) -> None:
    """Write the files below `source` as objects below `target`, JSON files last, and then remove other objects there.

    A kill in between leaves some of both: what is read needs a manifest, and that comes afterwards.
    """
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: (path.suffix == ".json", path))
    for path in files:
        upload(path, target / path.relative_to(source).as_posix())
    kept = {path.relative_to(source).as_posix() for path in files}
    for name in listing(target).keys() - kept:
        remove(target / name)


def create(path: Path, content: bytes) -> None:
    """Write a small object unless there is one. Raises FileExistsError if there is: of several writers one succeeds, on stores
    that can create on condition, as those of `LIBRARIES` do."""
    persistently(path, lambda: _files(path).pipe_file(_key(path), content, mode="create"))


def try_writing(folder: Path) -> None:
    """Write and remove an object below `folder`, at once: raises what the client raises."""
    key = _key(folder / f".probe-{secrets.token_hex(4)}")
    _files(folder).pipe_file(key, b"")
    _files(folder).rm_file(key)


def remove(path: Path) -> None:
    """Remove an object, if there is one."""
    def rm() -> None:
        try:
            _files(path).rm_file(_key(path))
        except FileNotFoundError:
            return

    persistently(path, rm)


def remove_below(folder: Path) -> None:
    """Remove every object below `folder`."""
    for name in listing(folder):
        remove(folder / name)


def persistently(path: Path, work: Callable[[], Result]) -> Result:
    """The result of `work`, which writes to the store of `path`; it is done again, with one warning, while the store does not
    answer or refuses for the moment. Raises StoppedError after `PATIENCE` seconds; what waiting does not mend at once."""
    wait, end, told = 1.0, time.monotonic() + PATIENCE, False
    while True:
        try:
            return work()
        except Exception as error:
            if not is_passing(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            if time.monotonic() + wait > end:
                raise StoppedError(f"{path}: the store has taken no writes for {PATIENCE:.0f} s ({reason}): what stands is "
                                   "whole; run the same command again when it does") from None
            if not told:
                log.warning("%s: the store takes no writes now (%s): trying again for %.0f s", path, reason, PATIENCE)
                told = True
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def is_passing(error: BaseException) -> bool:
    """Whether an error is one of a store that may be mended by waiting: it does not answer, is busy, or failed inside."""
    if isinstance(error, (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)):
        return False
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError"):
        return False
    return isinstance(error, OSError) or is_of_client(error)


def is_of_client(error: BaseException) -> bool:
    """Whether an exception comes from the client of an object store."""
    return type(error).__module__.split(".")[0] in CLIENTS


def local_cache() -> Path:
    """Folder of this machine for what is fetched from an object store, or made again at will: HYDRA_HEADS_CACHE, else
    `.hydra-heads/cache` in the user's home."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given).expanduser().absolute()
    try:
        return Path.home() / ".hydra-heads" / "cache"
    except RuntimeError:  # a user without a home, as in a container
        return Path(tempfile.gettempdir()) / f"hydra-heads-{os.getuid()}" / "cache"


def local_copy(path: str | Path) -> Path:
    """A path of this machine's own with the content of `path`: itself, or a copy of an object or of all objects below it.

    A copy is fetched once for a machine and content: it lies in `local_cache` under a digest of names, sizes and tags. Raises
    InputError where there is nothing.
    """
    path = as_path(path)
    if not is_remote(path):
        return path
    found = listing(path)
    if not found and (one := stored(path)) is not None:
        found = {"": one}
    if not found:
        raise InputError(f"{path}: no such file or folder")
    told = "\n".join(f"{name}\t{about.bytes}\t{about.tag}" for name, about in found.items())
    place = local_cache() / "objects" / hashlib.sha256(str(path).encode()).hexdigest()[:16]
    target = place / hashlib.sha256(told.encode()).hexdigest()[:16] / path.name
    if not all(_has_size(target / name, about.bytes) for name, about in found.items()):
        _fetch(path, target, found)
    return target


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _fetch(path: Path, target: Path, found: dict[str, Stored]) -> None:
    version, place = target.parent, target.parent.parent
    place.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=place, prefix="."))
    try:
        for name in found:
            (made / path.name / name).parent.mkdir(parents=True, exist_ok=True)
            _files(path).get_file(_key(path / name if name else path), str(made / path.name / name))
        made.chmod(0o755)
        shutil.rmtree(version, ignore_errors=True)  # one that a power cut tore
        with suppress(OSError):  # another process has fetched the same in between
            made.rename(version)
        if not target.exists():
            raise StoppedError(f"{version}: cannot be written: make room there, or set {CACHE_VARIABLE} to another folder")
    finally:
        shutil.rmtree(made, ignore_errors=True)
    for one in place.iterdir():  # earlier content, and what killed processes have left; others may be reading what is young
        if one != version and time.time() - one.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(one, ignore_errors=True)


@contextmanager
def work_folder() -> Iterator[Path]:
    """A temporary folder of this machine, for what is uploaded."""
    with tempfile.TemporaryDirectory(prefix="hydra-heads-upload-") as temporary:
        yield Path(temporary)


def arrow_files(path: Path) -> tuple[Any, str]:
    """The file system of an object store as Arrow and Ray take it, and the name of `path` in it: with the same client, and so the
    same credentials."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(_files(path))), _key(path)


def _files(path: Path) -> Any:
    """fsspec's file system of a path."""
    return cast(Any, path).fs


def _key(path: Path) -> str:
    """The name of a path in its file system: `bucket/folder/name`."""
    return str(cast(Any, path).path)


def _stored(about: dict[str, Any]) -> Stored:
    written = about.get("LastModified") or about.get("last_modified") or about.get("updated")
    tag = next((about[name] for name in ("ETag", "etag", "md5Hash", "content_md5", "generation") if about.get(name)), "")
    return Stored(int(about["size"]), str(tag).strip('"'), _seconds(written))


def _seconds(moment: Any) -> float:
    if isinstance(moment, str):
        from datetime import datetime

        moment = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    return float(moment.timestamp()) if moment is not None else 0.0
