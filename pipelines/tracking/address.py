"""The address of MLflow's store, and the command that opens its UI. This module does not import MLflow."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from hydra_core.errors import InputError
from hydra_core.storage import is_remote
from pipelines.config import RunConfig
from pipelines.runtime.programs import program
from pipelines.runtime.provenance import without_credentials


def tracking_uri(config: RunConfig) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite at an absolute path under storage.

    Raises InputError for a SQLite file at a relative path, as each worker would create its own, for a storage that cannot be
    written, and for one in an object store, which holds no database.
    """
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return _absolute(uri, "tracking.uri" if config.tracking.uri else "MLFLOW_TRACKING_URI")
    if is_remote(config.storage):
        raise InputError(f"storage={config.storage}: MLflow's database cannot lie there: set tracking.uri or "
                         "MLFLOW_TRACKING_URI to the address of an MLflow server")
    folder = Path(config.storage) / "mlflow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"storage={config.storage}: cannot be written ({error.strerror}): choose another") from None
    return f"sqlite:///{folder}/mlflow.db"


def registry_uri(config: RunConfig) -> str:
    """`tracking.registry_uri`, else MLFLOW_REGISTRY_URI, else where runs are recorded. Raises InputError as `tracking_uri`."""
    if config.tracking.registry_uri:
        return _absolute(config.tracking.registry_uri, "tracking.registry_uri")
    uri = os.environ.get("MLFLOW_REGISTRY_URI")
    return _absolute(uri, "MLFLOW_REGISTRY_URI") if uri else tracking_uri(config)


def _absolute(uri: str, source: str) -> str:
    if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
        raise InputError(f"{source}={uri}: the path must be absolute: sqlite:////data/mlflow.db has four slashes")
    return uri


def ui_command(config: RunConfig) -> str:
    """The command that opens MLflow's UI with the runs of this store; for a server, its address. It is shown, and so holds no
    credentials."""
    uri = without_credentials(tracking_uri(config))
    if uri.startswith(("http://", "https://")):
        return uri
    return shlex.join([*program("mlflow"), "ui", "--backend-store-uri", uri])
