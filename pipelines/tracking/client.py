"""MLflow's client. This module sets MLflow's environment variables before it imports it, so others import MLflow from here."""

from __future__ import annotations

import logging
import os
from urllib.parse import urlsplit

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
DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}


def open_client(uri: str) -> MlflowClient:
    """A client whose server answers. Raises InputError within seconds if it does not, or if the store is refused."""
    shown = without_credentials(uri)
    if fault := _why_dead(uri):
        raise InputError(f"tracking.uri={shown}: no MLflow server answers there ({fault}): start it or choose another")
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        return client
    except Exception as error:  # each kind of store raises its own exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"tracking.uri={shown}: cannot be used ({reason})") from None


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
