"""Heads and decoding configurations as MLflow's `LoggedModel`s.

Each training makes one for its heads: PENDING while it trains, READY with signature, parameters, provenance and files when it is
finished, FAILED if it fails. What `tree` and `bench` measure of these heads is linked to it, with the data that it was measured
on, so that one search answers "which heads give most tokens per step on these questions" (`best_models`). Registering makes one
for the configuration that is promoted, and the registered version points at it.

    MLmodel, requirements.txt        what MLflow needs to load it: `mlflow.pyfunc.load_model`, `mlflow models serve`
    provenance.json                  how the heads were made
    heads/ or configuration/         what decodes: safetensors and JSON, nothing pickled
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import local_copy
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import read_manifest
from pipelines.runtime.console import say
from pipelines.tracking.address import tracking_uri
from pipelines.tracking.client import LoggedModelInput, LoggedModelOutput, MlflowClient, MlflowException, open_client
from pipelines.tracking.runs import Run, flatten, work_goes_on
from pipelines.tracking.stage_settings import stage_settings

HEADS, CONFIGURATION = "heads", "configuration"
"""Folder of the files inside a model, and kind of a model: heads of one training; a configuration to decode with."""
TYPES = {HEADS: "draft-heads", CONFIGURATION: "decoding-configuration"}
MODEL_TAG = "hydra_heads.model_id"
OUTPUT = "model"
"""Name under which the manifest of a stage has the address of its heads' model."""
PREFIX = "models:/"
LOADER = "pipelines.generate.pyfunc"
"""Module that loads a model for MLflow."""
DEFAULTS = {"max_new_tokens": 256, "temperature": 0.0, "seed": 0}
"""Parameters of a prediction."""


@dataclass(frozen=True)
class TrackedModel:
    """The `LoggedModel` of what a run makes."""

    run: Run
    model_id: str

    @property
    def uri(self) -> str:
        """Its address, `models:/ID`."""
        return f"{PREFIX}{self.model_id}"

    def finish(self, config: RunConfig, folder: Path, kind: str = HEADS) -> None:
        """Store the files of `folder` and make the model READY. A model that is READY is left as it is."""
        client = self.run.client
        model = client.get_logged_model(self.model_id)
        if str(model.status) == "READY":
            return
        local = local_copy(folder)
        with tempfile.TemporaryDirectory() as temporary:
            _describe(Path(temporary), model, config, kind, local)
            self.run.log_model_files(self.model_id, local, kind)
            self.run.log_model_files(self.model_id, Path(temporary))
        client.finalize_logged_model(self.model_id, "READY")

    def fail(self) -> None:
        """Make the model FAILED."""
        self.run.client.finalize_logged_model(self.model_id, "FAILED")


def open_model(run: Run, config: RunConfig, name: str, params: Mapping[str, Any], tags: Mapping[str, str],
               kind: str = HEADS) -> TrackedModel:
    """The model that `run` makes, which is created if this run has none yet; an unfinished run that is taken up again has one."""
    client = run.client
    about = client.get_run(run.run_id)
    known = about.data.tags.get(MODEL_TAG)
    if known is not None and exists(client, known):
        return TrackedModel(run, known)
    made_by = {key: value for key, value in about.data.tags.items() if key == "mlflow.user" or key.startswith("mlflow.source.")}
    model = client.create_logged_model(about.info.experiment_id, name=_allowed(name), source_run_id=run.run_id,
                                       model_type=TYPES[kind], params=flatten(params),
                                       tags=made_by | {"hydra_heads.name": config.name} | dict(tags))
    run.set_tags({MODEL_TAG: model.model_id})
    client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, 0)])
    return TrackedModel(run, model.model_id)


@contextmanager
def heads_model(run: Run, config: RunConfig, drafter: str) -> Iterator[TrackedModel]:
    """The model of the heads that the block trains. It is FAILED if the block raises."""
    model = open_model(run, config, f"{config.name} {drafter}", stage_settings(config, "train", drafter),
                       {"hydra_heads.drafter": drafter})
    try:
        yield model
    except BaseException:
        try:
            model.fail()
        except Exception as error:  # the training has failed for a reason that matters more
            say("tracking", f"{model.uri} is not marked as failed: {str(error).splitlines()[0][:200]}")
        raise


def finish_model(model: TrackedModel, config: RunConfig, heads: Path) -> None:
    """Store trained heads in their model. A store that does not take them now costs no training: the next stage that reads
    these heads stores them (`model_of`)."""
    try:
        model.finish(config, heads)
    except StoppedError as error:
        say("tracking", f"the heads are not stored in MLflow yet, the next stage does it: {error}")


def model_of(run: Run, config: RunConfig, heads: Path) -> TrackedModel | None:
    """The model of the heads in `heads`, a folder that `train` or `tree` wrote, as an input of `run`; None where this store has
    none. Files that could not be stored when the training ended are stored now."""
    try:
        manifest = read_manifest(heads.parent)
    except InputError:
        return None
    uri = str(((manifest or {}).get("result") or {}).get("outputs", {}).get(OUTPUT, ""))
    model_id = uri.removeprefix(PREFIX)
    if not uri.startswith(PREFIX):
        return None
    with work_goes_on(f"heads {heads}"):
        if exists(run.client, model_id):
            model = TrackedModel(run, model_id)
            if manifest is not None and manifest["stage"] == "train":
                finish_model(model, config, heads)
            run.client.log_inputs(run.run_id, models=[LoggedModelInput(model_id)])
            return model
    return None


def exists(client: MlflowClient, model_id: str) -> bool:
    """Whether the store has this model: not so on another server, or after its database was lost."""
    try:
        client.get_logged_model(model_id)
    except MlflowException:
        return False
    return True


def best_models(config: RunConfig, dataset: str, digest: str | None = None, metric: str = "tokens_per_step",
                most: int = 10) -> list[Any]:
    """The heads with the highest `metric` on the data `dataset` (the name that the run's input has, such as `spec-bench`), the
    best first, at most `most`. `digest`: of the data, at most 36 characters. Raises InputError for an experiment that does not
    exist."""
    client = open_client(tracking_uri(config))
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        raise InputError(f"tracking.experiment={config.tracking.experiment}: there is no such experiment: see `mlflow ui`")
    data = {"dataset_name": dataset} | ({"dataset_digest": digest} if digest else {})
    return list(client.search_logged_models(
        [experiment.experiment_id], filter_string=f"metrics.{metric} > 0", datasets=[data], max_results=most,
        order_by=[{"field_name": f"metrics.{metric}", "ascending": False, **data}]))


def _allowed(name: str) -> str:
    """A name of a `LoggedModel`, in which MLflow allows no / : . % and quotes."""
    return "".join("-" if character in "/:.%\"'" else character for character in name)


def _describe(folder: Path, model: Any, config: RunConfig, kind: str, files: Path) -> None:
    """Write what MLflow reads of a model, and its provenance, to `folder`."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import add_to_model
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    params = ParamSchema([ParamSpec(name, "double" if isinstance(value, float) else "long", value)
                          for name, value in DEFAULTS.items()])
    about = Model(artifact_path=model.artifact_location, run_id=model.source_run_id, model_uuid=model.model_id,
                  signature=ModelSignature(Schema([ColSpec("string")]), Schema([ColSpec("string")]), params),
                  model_id=model.model_id, metadata={"base": _base_of(files)})
    base = {"base_model": config.base.model, "base_dtype": config.base.dtype}
    add_to_model(about, loader_module=LOADER, data=kind, model_config=base)
    about.save(str(folder / "MLmodel"))
    lines = [f"{name}=={metadata.version(name)}" for name in ("hydra-heads", "mlflow")]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for provenance in (files / "provenance.json", files / HEADS / "provenance.json"):
        if provenance.is_file():
            (folder / "provenance.json").write_bytes(provenance.read_bytes())


def _base_of(files: Path) -> dict[str, Any]:
    """The identity of the base that heads or a configuration belong to: name, digest, weight format."""
    for name in ("configuration.json", "config.json"):
        if (files / name).is_file():
            return dict(json.loads((files / name).read_text(encoding="utf-8")).get("base") or {})
    return {}
