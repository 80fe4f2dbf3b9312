"""MLflow's client. This module sets MLflow's environment variables before it imports it, so others import MLflow from here."""

from __future__ import annotations

import functools
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from filelock import Timeout

from hydra_core.errors import InputError, StoppedError
from hydra_core.files import file_lock
from pipelines.runtime.faults import first_line, storage_fault, tells_full
from pipelines.runtime.provenance import without_credentials
from pipelines.runtime.reachability import why_silent, why_unreachable

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for results
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # one for each small file that is read
for _noisy, _level in (("alembic", logging.WARNING), ("mlflow.tracking", logging.WARNING),
                       ("mlflow.store.db.utils", logging.CRITICAL)):  # it logs a traceback of what it raises as well
    logging.getLogger(_noisy).setLevel(_level)

from mlflow.entities import (  # noqa: E402
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    LoggedModelOutput,
    Metric,
    Param,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS  # noqa: E402
from mlflow.utils.time import get_current_time_millis  # noqa: E402

__all__ = ["MLFLOW_MODEL_VERSIONS", "AwayError", "Dataset", "DatasetInput", "InputTag", "LoggedModelInput", "LoggedModelOutput",
           "Metric", "MlflowClient",
           "MlflowException", "Param", "RunTag", "ViewType", "as_default", "get_current_time_millis", "open_client", "why_dead"]
TABLES_SECONDS, BUSY_SECONDS = 120.0, 30.0
"""Longest wait for another process that makes the tables of an SQLite file, and for one that writes to it."""
DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
DATABASES = {"sqlite", *DATABASE_PORTS}
"""Schemes of the stores that this process writes to itself; behind others a server keeps runs and artifacts."""


class AwayError(StoppedError):
    """The store takes no records now, and will take the same ones later: its server or database is away, its disk is full."""


def open_client(uri: str, registry: str | None = None) -> MlflowClient:
    """A client whose server answers, and whose faults later are one line; `registry`: address of the model registry, where that
    is another one. Raises StoppedError within seconds if no server answers, for a fault that may pass and for a full disk,
    InputError for a store that cannot be used as it is given."""
    shown = without_credentials(uri)
    for field, address in (("tracking.uri", uri), ("tracking.registry_uri", registry)):
        if address and (fault := why_dead(address)):
            raise AwayError(f"{field}={without_credentials(address)}: no MLflow server answers there ({fault}): start it or "
                            "choose another")
    try:
        if _has_tables(uri):
            return _told_in_one_line(_connected(uri, registry or uri), shown)
        with _one_at_a_time(uri):
            return _told_in_one_line(_connected(uri, registry or uri), shown)
    except Timeout:
        raise InputError(f"tracking.uri={shown}: another process has been making its tables for {TABLES_SECONDS:.0f} s: try "
                         f"again, or delete {_database(uri)}.lock if none is running") from None
    except Exception as error:  # each kind of store raises its own exceptions
        if (path := _database(uri)) and (full := storage_fault(error, path.parent)):
            raise full from None
        reason = first_line(error)
        if "_alembic_tmp_" in reason or "already exists" in reason:
            raise InputError(f"tracking.uri={shown}: an interrupted first start left its tables half-made ({reason}): delete "
                             f"{_database(uri) or 'that database'} and run again") from None
        if _database(uri) is None and tells_full(str(error)):
            raise AwayError(f"tracking.uri={shown}: {_line_of(str(error), remote=True)}") from None
        if is_refusal(error):
            raise InputError(f"tracking.uri={shown}: cannot be used ({reason})") from None
        raise AwayError(f"tracking.uri={shown}: cannot be used now ({reason}): run the same command again when that is "
                        "mended") from None


@contextmanager
def as_default(uri: str) -> Iterator[None]:
    """Make `uri` the store that MLflow's own code asks within the block: that of a registry in a database looks models up there
    and not in the client's store."""
    before = os.environ.get(_URI_VARIABLE)
    os.environ[_URI_VARIABLE] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ[_URI_VARIABLE]
        else:
            os.environ[_URI_VARIABLE] = before


_URI_VARIABLE = "MLFLOW_TRACKING_URI"


def is_refusal(error: BaseException) -> bool:
    """Whether a store will refuse again until a setting, a permission or an installation changes: an address that is none, a user
    who may not, a driver that is missing. All else (time-outs, a server's own faults, a locked database) may pass."""
    refused = (ImportError, ValueError, NotADirectoryError, PermissionError, FileNotFoundError, IsADirectoryError)
    return isinstance(error, refused) or type(error).__name__ in _REFUSED_TYPES or (
        getattr(error, "error_code", None) in _REFUSED_CODES) or _REFUSED.search(str(error)) is not None


_REFUSED_TYPES = ("ArgumentError", "NoSuchModuleError", "NoCredentialsError")
"""Of SQLAlchemy and botocore, which a store may do without."""
_REFUSED_CODES = ("UNAUTHENTICATED", "PERMISSION_DENIED", "ENDPOINT_NOT_FOUND", "INVALID_PARAMETER_VALUE",
                  "RESOURCE_DOES_NOT_EXIST")
_REFUSED = re.compile(r"error code 40[0-7]\b|\b(401|403) Client Error|\(40[134]\)|AccessDenied|NoSuchBucket|InvalidAccess"
                      r"|unable to open database file|file is not a database|out-of-date database schema|authentication failed"
                      r"|Access denied|database .* does not exist|Unknown database|Not a directory|Permission denied",
                      re.IGNORECASE)


class _OneLine:
    """A client whose calls raise, with one line, AwayError for a server that went away, and StoppedError for an experiment or a
    run that somebody deleted meanwhile."""

    def __init__(self, client: MlflowClient, shown: str) -> None:
        self._client, self._shown, self._remote = client, shown, _database(shown) is None

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **more: Any) -> Any:
            try:
                return method(*arguments, **more)
            except MlflowException as error:
                if (line := _line_of(str(error), self._remote)) is None:
                    if _FORBIDDEN.search(str(error)):
                        raise InputError(f"tracking.uri={self._shown}: refuses this ({first_line(error)[:200]}): correct its "
                                         "user and password, or their permissions") from None
                    if self._remote and error.error_code in _PASSING_CODES:
                        raise AwayError(f"tracking.uri={self._shown}: does not take this now ({first_line(error)[:200]}): run "
                                        "the same command again when that is mended") from None
                    raise
                kind = StoppedError if _DELETED.search(str(error)) else AwayError
                raise kind(f"tracking.uri={self._shown}: {line}") from None

        return call


def _told_in_one_line(client: MlflowClient, shown: str) -> MlflowClient:
    return cast(MlflowClient, _OneLine(client, shown))


_DELETED = re.compile(r"The (run|experiment) (\S+) must be in the '?active'? state", re.IGNORECASE)
_AWAY = re.compile(r"API request to .* failed with (timeout exception|exception|error code (408|429|5\d\d))|Max retries exceeded"
                   r"|Connection (refused|reset|aborted)|could not connect|server closed the connection|terminating connection"
                   r"|database system is (starting|shutting)|Lost connection|server has gone away|Can't connect")

_PASSING_CODES = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
_FORBIDDEN = re.compile(r"API request to .* failed with error code 40[13]")


def _line_of(message: str, remote: bool = False) -> str | None:
    """What a person reads of a fault of the store, None for one that a caller knows what to do about. `remote`: the store is on
    a server."""
    if found := _DELETED.search(message):
        what = found[1].lower()
        return (f"the {what} {found[2]} was deleted while this command used it: `mlflow {what}s restore --{what}-id {found[2]}`, "
                "or run the same command again")
    if remote and tells_full(message):
        return "the disk of the MLflow server is full: run the same command again when that is mended"
    if _AWAY.search(message):
        shown = without_credentials(message.splitlines()[0])[:200]
        return f"the MLflow server does not answer any more ({shown}): run the same command again"
    if "database is locked" in message:
        return "other processes write to its database without a pause: run the same command again"
    return None


def _has_tables(uri: str) -> bool:
    """Whether an SQLite store has all its tables already: the lock is for those who make them."""
    path = _database(uri)
    if path is None or not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return False
    return found is not None and found[0] == _newest_schema()


@functools.cache
def _newest_schema() -> str | None:
    """The version of the tables that this MLflow makes, None if it cannot be found out."""
    try:
        from mlflow.store.db.utils import _get_latest_schema_revision

        return str(_get_latest_schema_revision())
    except (ImportError, AttributeError):
        return None


def _connected(uri: str, registry: str) -> MlflowClient:
    """A client that has read from the store, which makes its tables at first. A busy SQLite is waited for."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            client = MlflowClient(tracking_uri=uri, registry_uri=registry)
            client.search_experiments(max_results=1)
            return client
        except Exception as error:
            if "database is locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _database(uri: str) -> Path | None:
    """The file of an SQLite store, or None."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:////") else None


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Several first starts on one new SQLite file would each make its tables, and leave it broken for good."""
    path = _database(uri)
    if path is None or not path.parent.is_dir():
        yield
        return
    with file_lock(f"{path}.lock", timeout=TABLES_SECONDS):
        yield


def why_dead(uri: str) -> str | None:
    """Why the server does not answer, or None if it does. A file needs no server."""
    if uri.startswith(("http://", "https://")):
        return why_unreachable(f"{without_credentials(uri).rstrip('/')}/health")
    try:
        parts = urlsplit(uri)
        port = parts.port or DATABASE_PORTS.get(parts.scheme.split("+")[0])
    except ValueError as error:
        raise InputError(f"tracking.uri={without_credentials(uri)}: is no address ({error})") from None
    return why_silent(parts.hostname, port) if parts.hostname and port else None
