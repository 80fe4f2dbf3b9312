"""MLflow's model registry: configurations as versions of a model, and aliases for versions."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import as_path, is_remote
from pipelines.config import RunConfig
from pipelines.runtime.faults import first_line, storage_fault
from pipelines.runtime.files import atomic_folder, write_text
from pipelines.runtime.provenance import provenance, without_credentials
from pipelines.tracking.address import registry_uri, tracking_uri
from pipelines.tracking.client import MLFLOW_MODEL_VERSIONS, MlflowClient, MlflowException, as_default, is_refusal, open_client
from pipelines.tracking.models import CONFIGURATION, MODEL_TAG, PREFIX, open_model
from pipelines.tracking.runs import Run

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))$")

UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Codes with which MLflow says that there is no such model or version, and no such alias."""


class NotRegistered(InputError):
    """The registry has no such model."""


def register(config: RunConfig, name: str, run: Run, artifact_path: str, alias: str | None, tags: Mapping[str, str], *,
             folder: Path | None = None) -> int:
    """Register a run's artifact folder, a configuration, as a new version of model `name`, with `alias` if one is given; returns
    the version.

    The version points at a `LoggedModel` of its own, which MLflow can load and serve, made of `folder`, the same files on this
    machine, or of the artifacts. Besides `tags` the version has those of `_facts`.
    """
    client = registry_client(config)
    run.require_sent()
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if alias is not None and "previous_champion" not in tags:
        tags = {"previous_champion": _named(client, name, alias) or "none"} | dict(tags)
    with tempfile.TemporaryDirectory() as temporary:
        files = folder or Path(run.client.download_artifacts(run.run_id, artifact_path, temporary))
        facts = _facts(config, files) | {key: str(value) for key, value in tags.items()}
        model = open_model(run, config, name, facts, {}, CONFIGURATION)
        model.finish(config, files, CONFIGURATION)
    source = model.uri
    if registry_uri(config) != tracking_uri(config):  # it does not know the models of another server
        source = str(run.client.get_logged_model(model.model_id).artifact_location)
    with as_default(tracking_uri(config)):
        version = client.create_model_version(name, source=source, run_id=run.run_id, tags=facts, model_id=model.model_id)
        if source == model.uri:  # what `mlflow.register_model` writes too, so that the model's page names the version
            run.client.set_logged_model_tags(model.model_id, {
                MLFLOW_MODEL_VERSIONS: json.dumps([{"name": name, "version": str(version.version)}])})
    if alias is not None:
        client.set_registered_model_alias(name, alias, version.version)
    return int(version.version)


def record_champion(run: Run, champion: str, version: int, why: str, figures: Mapping[str, float | None],
                    bench: tuple[str | None, str] | None = None) -> None:
    """Write what MLflow shows of a promotion: the run's description, champion and figures of the chain, where those of its
    last bench may be of a contender that was not promoted, and the figures of the version's model on the questions that it was
    chosen by. `bench`: the run of that bench, and the name of its questions."""
    known = {name: value for name, value in figures.items() if value is not None}
    model_id = run.client.get_run(run.run_id).data.tags.get(MODEL_TAG)
    data = _questions_of(run, *bench) if bench is not None else None
    if model_id is not None and data is not None:
        run.log_model_metrics(model_id, known, *data)
    run.log_metrics(known)
    run.describe(f"{champion} is champion: version {version}", f"{why}\n")
    run.log_headline(known, {"champion": f"{champion} (version {version})", "champion_version": str(version)},
                     model_id=model_id)


def _questions_of(run: Run, bench_run: str | None, name: str) -> tuple[str, str] | None:
    """Name and digest of the questions of a bench, one of its inputs; None where this server does not know it."""
    if bench_run is None:
        return None
    try:
        inputs = run.client.get_run(bench_run).inputs
    except MlflowException:
        return None
    found = inputs.dataset_inputs if inputs is not None else []
    return next(((one.dataset.name, one.dataset.digest) for one in found if one.dataset.name == name), None)


def registry_client(config: RunConfig) -> MlflowClient:
    """A client for the model registry, which may be another server than the one that records runs."""
    return open_client(tracking_uri(config), registry_uri(config))


def _named(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that an alias names, None without one."""
    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code not in UNKNOWN:
            raise
        return None


def _facts(config: RunConfig, files: Path) -> dict[str, str]:
    """What a version is known by besides the decision: the digest of its base and of its files, machine and commit."""
    try:
        base = json.loads((files / "configuration.json").read_text(encoding="utf-8"))["base"]
        facts = {"base_digest": str(base["digest"]), "weight_format": str(base["weight_format"])}
    except (OSError, ValueError, KeyError, TypeError):  # no configuration of this project
        facts = {}
    made_by = provenance(config)
    hardware = made_by.get("hardware") or {}
    machine = hardware.get("label") if isinstance(hardware, Mapping) else hardware
    facts["hardware"] = str(machine or f"{made_by['cpus']} cores of {made_by['processor']}")
    if (git := made_by["git"]) and git.get("commit"):
        facts["git_commit"] = str(git["commit"])
    return facts


def resolve(config: RunConfig, uri: str, download: Path, field: str = "serve.model") -> tuple[int, Path]:
    """Version and folder of `models:/NAME@alias` or `models:/NAME/3`, which `field` names.

    Artifacts of a remote store are copied to `download`, once a version, where every node sees them. Raises InputError for a
    malformed name and for a version whose folder does not exist any more, NotRegistered for an unknown name, alias or version,
    StoppedError for a registry that does not answer the question and for artifacts that cannot be downloaded.
    """
    match = _MODEL_URI.match(uri)
    if match is None:
        raise InputError(f"{field}={uri}: write it as models:/NAME@alias or models:/NAME/VERSION")
    client = registry_client(config)
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
    source = _location(client, str(version.source), f"{field}={uri}: version {version.version}")
    if source.startswith("file://"):
        folder = Path(unquote(urlsplit(source).path))
        if not folder.is_dir():
            raise InputError(f"{field}={uri}: version {version.version} lay in {folder}, which is gone: "
                             "run `hydra-heads promote` again")
        return int(version.version), folder
    if is_remote(source) and is_remote(config.storage):  # every node reads it there
        return int(version.version), as_path(source)
    return int(version.version), _downloaded(config, source, download / match["name"] / str(version.version))


def _location(client: MlflowClient, source: str, said: str) -> str:
    """The address of the configuration that a version's `source` names: a `LoggedModel`, or the artifacts of a run, as for
    versions that earlier releases registered. Raises InputError, which begins with `said`, for a model that was deleted."""
    if source.startswith(PREFIX):
        try:
            source = str(client.get_logged_model(source.removeprefix(PREFIX)).artifact_location)
        except MlflowException as error:
            if error.error_code not in UNKNOWN:
                raise
            raise InputError(f"{said} points at the model {source.removeprefix(PREFIX)}, which was deleted: run "
                             "`hydra-heads promote` again") from None
        return f"{source}/{CONFIGURATION}"
    is_model = re.search(r"/models/m-[0-9a-f]{32}/artifacts/?$", source)  # of a registry that is another server
    return f"{source.rstrip('/')}/{CONFIGURATION}" if is_model else source


def _downloaded(config: RunConfig, source: str, folder: Path) -> Path:
    """The artifacts at `source`, below `folder`. They are downloaded whole or not at all: others may be loading them."""
    # a database that was made again gives other artifacts the same version
    target = folder / hashlib.sha256(source.encode()).hexdigest()[:8]
    whole = target.with_name(f"{target.name}.whole") if is_remote(target) else target  # a folder of objects grows one by one
    if not whole.exists():
        from mlflow.artifacts import download_artifacts

        try:
            with atomic_folder(target) as temporary:
                download_artifacts(artifact_uri=source, dst_path=str(temporary), tracking_uri=tracking_uri(config))
                if not any(path.is_file() for path in temporary.rglob("*")):  # a server lists a folder that is gone as empty
                    raise FileNotFoundError("none were found")
            if whole != target:
                write_text(whole, "")
        except Exception as error:  # each kind of store raises its own exceptions
            if fault := storage_fault(error, folder):
                raise fault from None
            shown = without_credentials(source)
            if is_refusal(error):
                raise InputError(f"{shown}: the registered version has no files there ({first_line(error)[:200]}): run "
                                 "`hydra-heads promote` again") from None
            raise StoppedError(f"{shown}: cannot be downloaded ({first_line(error)[:200]})") from None
    inside = list(target.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else target
