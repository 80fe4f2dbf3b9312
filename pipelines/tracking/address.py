"""The address of MLflow's store, and the command that opens its UI. This module does not import MLflow."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.runtime.programs import program
from pipelines.runtime.provenance import without_credentials


def tracking_uri(config: RunConfig) -> str:
    """`tracking.uri`, else MLFLOW_TRACKING_URI, else SQLite at an absolute path under storage.

    Raises InputError for a SQLite file at a relative path, as each worker would create its own, and for a storage that cannot
    be written.
    """
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
            source = "tracking.uri" if config.tracking.uri else "MLFLOW_TRACKING_URI"
            raise InputError(f"{source}={uri}: the path must be absolute: sqlite:////data/mlflow.db has four slashes")
        return uri
    folder = Path(config.storage) / "mlflow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"storage={config.storage}: cannot be written ({error.strerror}): choose another") from None
    return f"sqlite:///{folder}/mlflow.db"


def ui_command(config: RunConfig) -> str:
    """The command that opens MLflow's UI with the runs of this store; for a server, its address. It is shown, and so holds no
    credentials."""
    uri = without_credentials(tracking_uri(config))
    if uri.startswith(("http://", "https://")):
        return uri
    return shlex.join([*program("mlflow"), "ui", "--backend-store-uri", uri])
