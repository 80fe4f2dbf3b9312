"""MLflow's client. This module sets MLflow's environment variables before it imports it, so others import MLflow from here."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from hydra_core.errors import InputError
from pipelines.runtime.provenance import without_credentials
from pipelines.runtime.reachability import why_silent, why_unreachable

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
for _noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
    logging.getLogger(_noisy).setLevel(logging.WARNING)

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from mlflow.utils.time import get_current_time_millis  # noqa: E402

__all__ = ["Dataset", "DatasetInput", "InputTag", "Metric", "MlflowClient", "MlflowException", "Param", "RunTag",
           "get_current_time_millis", "open_client"]
TABLES_SECONDS, BUSY_SECONDS = 120.0, 30.0
"""Longest wait for another process that makes the tables of an SQLite file, and for one that writes to it."""
DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}


def open_client(uri: str) -> MlflowClient:
    """A client whose server answers. Raises InputError within seconds if it does not, or if the store is refused."""
    shown = without_credentials(uri)
    if fault := _why_dead(uri):
        raise InputError(f"tracking.uri={shown}: no MLflow server answers there ({fault}): start it or choose another")
    try:
        with _one_at_a_time(uri):
            return _connected(uri)
    except Timeout:
        raise InputError(f"tracking.uri={shown}: another process has been making its tables for {TABLES_SECONDS:.0f} s: try "
                         f"again, or delete {_database(uri)}.lock if none is running") from None
    except Exception as error:  # each kind of store raises its own exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "_alembic_tmp_" in reason or "already exists" in reason:
            raise InputError(f"tracking.uri={shown}: an interrupted first start left its tables half-made ({reason}): delete "
                             f"{_database(uri) or 'that database'} and run again") from None
        raise InputError(f"tracking.uri={shown}: cannot be used ({reason})") from None


def _connected(uri: str) -> MlflowClient:
    """A client that has read from the store, which makes its tables at first. A busy SQLite is waited for."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
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
    with FileLock(f"{path}.lock", timeout=TABLES_SECONDS):
        yield


def _why_dead(uri: str) -> str | None:
    """Why the server does not answer, or None if it does. A file needs no server."""
    if uri.startswith(("http://", "https://")):
        return why_unreachable(f"{without_credentials(uri).rstrip('/')}/health")
    try:
        parts = urlsplit(uri)
        port = parts.port or DATABASE_PORTS.get(parts.scheme.split("+")[0])
    except ValueError as error:
        return str(error)
    return why_silent(parts.hostname, port) if parts.hostname and port else None
