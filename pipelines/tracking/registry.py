"""MLflow's model registry: configurations as versions of a model, and aliases for versions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig
from pipelines.runtime.faults import first_line, storage_fault
from pipelines.runtime.files import atomic_folder
from pipelines.runtime.provenance import without_credentials
from pipelines.tracking.address import tracking_uri
from pipelines.tracking.client import MlflowException, open_client
from pipelines.tracking.runs import Run

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")

UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Codes with which MLflow says that there is no such model or version, and no such alias."""


class NotRegistered(InputError):
    """The registry has no such model."""


def register(config: RunConfig, name: str, run: Run, artifact_path: str, alias: str, tags: Mapping[str, str]) -> int:
    """Register a run's artifact folder as a new version of model `name`, with `alias`; returns the version."""
    client = open_client(tracking_uri(config))
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = run.artifact_uri(artifact_path)
    version = client.create_model_version(name, source=source, run_id=run.run_id, tags=dict(tags))
    client.set_registered_model_alias(name, alias, version.version)
    return int(version.version)


def resolve(config: RunConfig, uri: str, download: Path, field: str = "serve.model") -> tuple[int, Path]:
    """Version and local folder of `models:/NAME@alias` or `models:/NAME/3`, which `field` names.

    Artifacts of a remote store are downloaded to `download`, once a version. Raises InputError for a malformed name and for
    a version whose folder does not exist any more, NotRegistered for an unknown name, alias or version, StoppedError for
    a registry that does not answer the question and for artifacts that cannot be downloaded.
    """
    match = _MODEL_URI.match(uri)
    if match is None:
        raise InputError(f"{field}={uri}: write it as models:/NAME@alias or models:/NAME/VERSION")
    client = open_client(tracking_uri(config))
    try:
        if match["alias"]:
            version = client.get_model_version_by_alias(match["name"], match["alias"])
        else:
            version = client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if error.error_code not in UNKNOWN:
            raise StoppedError(f"{field}={uri}: the registry does not say which version that is ({first_line(error)[:200]}): run "
                               "the same command again when that is mended") from None
        raise NotRegistered(f"{field}={uri}: is not registered: run `hydra-heads promote` first, "
                         "or name a configuration folder") from None
    source = str(version.source)
    if source.startswith("file://"):
        folder = Path(unquote(urlsplit(source).path))
        if not folder.is_dir():
            raise InputError(f"{field}={uri}: version {version.version} lay in {folder}, which is gone: "
                             "run `hydra-heads promote` again")
        return int(version.version), folder
    return int(version.version), _downloaded(config, source, download / match["name"] / str(version.version))


def _downloaded(config: RunConfig, source: str, folder: Path) -> Path:
    """The artifacts at `source`, below `folder`. They are downloaded whole or not at all: others may be loading them."""
    # a database that was made again gives other artifacts the same version
    target = folder / hashlib.sha256(source.encode()).hexdigest()[:8]
    if not target.is_dir():
        from mlflow.artifacts import download_artifacts

        try:
            with atomic_folder(target) as temporary:
                download_artifacts(artifact_uri=source, dst_path=str(temporary), tracking_uri=tracking_uri(config))
        except Exception as error:  # each kind of store raises its own exceptions
            if fault := storage_fault(error, folder):
                raise fault from None
            raise StoppedError(f"{without_credentials(source)}: cannot be downloaded "
                               f"({first_line(error)[:200]})") from None
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target
