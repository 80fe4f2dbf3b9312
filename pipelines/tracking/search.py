"""Runs that MLflow has recorded: found by id or by exact name, and read as records.

The configuration of a run is its artifact `config.yaml`; of a run without that artifact it is its params.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import local_copy
from pipelines.config import RunConfig, present_name
from pipelines.runtime.faults import first_line
from pipelines.tracking.address import tracking_uri
from pipelines.tracking.client import MlflowClient, MlflowException, ViewType, open_client
from pipelines.tracking.runs import flatten

CHAIN, STAGE, PART, PARENT = "hydra_heads.chain", "hydra_heads.stage", "hydra_heads.part", "mlflow.parentRunId"
AT_ONCE = 500
"""Runs in one answer of MLflow."""
FINISHED, CONFIGURATION = "FINISHED", "config.yaml"


@dataclass(frozen=True)
class Input:
    """A data set or a folder that a run has read. `digest`: at most 36 characters; `path`: where it lay.

    MLflow keeps one record of data with the same name and digest, so the path may be that of another run that has read the same.
    """

    name: str
    digest: str
    path: str


@dataclass(frozen=True)
class RunRecord:
    """A run in MLflow.

    `name`: of its chain, as `name=` gave it; `stage`, `part`: of the chain (the part is a drafter's name); `started`, `ended`:
    seconds since 1970; `params`: the whole configuration, flattened, under the names that a user gives, once `complete` has
    read it.
    """

    run_id: str
    name: str
    stage: str = ""
    part: str | None = None
    parent_id: str | None = None
    status: str = FINISHED
    started: float = 0.0
    ended: float | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()


@dataclass(frozen=True)
class Chain:
    """The runs of one chain, newest first. `asked`: the one of its stages that was asked for by id."""

    name: str
    parent_id: str | None
    runs: tuple[RunRecord, ...]
    asked: RunRecord | None = None

    def finished(self, stage: str, part: str | None = None) -> list[RunRecord]:
        """Finished runs of `stage`, newest first; `part`: of this drafter alone."""
        return [run for run in self.runs if run.stage == stage and run.status == FINISHED and part in (None, run.part)]


class RunReader:
    """Reads what MLflow has recorded."""

    def __init__(self, client: MlflowClient, storage: str) -> None:
        self._client, self._storage = client, storage
        self._deleted: dict[str, bool] = {}

    @classmethod
    def open(cls, config: RunConfig) -> RunReader:
        """Connect. Raises InputError and StoppedError as `open_client` does."""
        return cls(open_client(tracking_uri(config)), config.storage)

    def find(self, asked: str) -> Chain:
        """The chain that `asked` names: by its name, its run id, or the run id of one of its stages.

        Of several chains with this name the one in this storage counts, else the one with the latest run. Raises InputError for
        a run that is none of this project's, is not there, or was deleted with its experiment or alone.
        """
        run = self._run(asked) if re.fullmatch(r"[0-9a-f]{32}", asked) else None
        if run is not None:
            return self._chain_of(asked, run)
        chains: dict[str, list[Any]] = {}
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", asked):  # LIKE takes `_` for any character, and some stores ignore case
            for one in self._search(f"tags.`{CHAIN}` LIKE '{asked}@%'", ViewType.ALL):
                if (chain := one.data.tags.get(CHAIN, "")).partition("@")[0] == asked:
                    chains.setdefault(chain, []).append(one)
        alive = {chain: kept for chain, runs in chains.items() if (kept := [one for one in runs if not self._is_deleted(one)])}
        if chains and not alive:
            raise InputError(f"compare.runs: the runs of {asked!r} were deleted, or their experiment was: restore them in "
                             "`mlflow ui`, or name another run")
        if not alive:
            raise InputError(f"compare.runs: {asked!r} is no run's name and no run id that MLflow knows: see `mlflow ui`")
        own = f"{asked}@{self._storage}".replace("'", "")
        runs = alive.get(own) or max(alive.values(), key=lambda found: max(one.info.start_time for one in found))
        parents = [one.info.run_id for one in runs if one.data.tags.get(STAGE) == "chain"]
        return Chain(asked, parents[0] if parents else None, _stages(runs))

    def get(self, run_id: str) -> RunRecord | None:
        """The run with this id, None if there is none or it was deleted."""
        run = self._run(run_id)
        return None if run is None or self._is_deleted(run) else _record(run)

    def complete(self, run: RunRecord) -> RunRecord:
        """`run` with its whole configuration as `params`, and what its stage has logged beside it."""
        return replace(run, params=_whole(self.text(run.run_id, CONFIGURATION), run.params))

    def text(self, run_id: str, path: str) -> str | None:
        """The artifact `path` of a run, None if there is none or its store does not give it."""
        return _text(self._client, run_id, path)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric, in order of steps."""
        return sorted((point.step, point.value) for point in self._client.get_metric_history(run_id, metric))

    def run_of_version(self, name: str, version: str) -> RunRecord | None:
        """The run that registered a version of a model, None if that is not known."""
        with suppress(MlflowException):
            run_id = self._client.get_model_version(name, version).run_id
            return self.get(run_id) if run_id else None
        return None

    def attach(self, run_id: str, files: Sequence[Path], artifact_path: str) -> None:
        """Log files as artifacts of a run that has ended, which stays as it is. Raises StoppedError if they cannot be stored, and
        for a run that was deleted, which MLflow would store them for."""
        if self.get(run_id) is None:
            raise StoppedError(f"the run {run_id} was deleted")
        try:
            for file in files:
                self._client.log_artifact(run_id, str(local_copy(file)), artifact_path)
        except (InputError, StoppedError) as error:
            raise StoppedError(str(error)) from None
        except Exception as error:  # each kind of store raises its own exceptions
            raise StoppedError(first_line(error)[:200]) from None

    def _run(self, run_id: str) -> Any:
        with suppress(MlflowException):
            return self._client.get_run(run_id)
        return None

    def _chain_of(self, asked: str, run: Any) -> Chain:
        if self._is_deleted(run):
            raise InputError(f"compare.runs: the run {asked} was deleted: `mlflow runs restore --run-id {asked}` (or its "
                             "experiment: `mlflow experiments restore`), or name another run")
        tags = run.data.tags
        if STAGE not in tags:
            raise InputError(f"compare.runs: the run {asked} was not made by this project: it has no tag {STAGE}")
        is_parent = tags[STAGE] == "chain"
        parent = asked if is_parent else tags.get(PARENT)
        runs = list(self._search(f"tags.`{PARENT}` = '{parent}'", ViewType.ACTIVE_ONLY)) if parent else [run]
        return Chain(_chain_name(run), parent, _stages(runs), None if is_parent else _record(run))

    def _search(self, wanted: str, view: int) -> Iterator[Any]:
        experiments = [one.experiment_id for one in self._client.search_experiments(view_type=ViewType.ALL)]
        token = None
        while experiments:
            found = self._client.search_runs(experiments, wanted, run_view_type=view, max_results=AT_ONCE, page_token=token,
                                             order_by=["attributes.start_time DESC"])
            yield from found
            if not (token := found.token):
                return

    def _is_deleted(self, run: Any) -> bool:
        experiment = run.info.experiment_id
        if experiment not in self._deleted:
            self._deleted[experiment] = self._client.get_experiment(experiment).lifecycle_stage == "deleted"
        return run.info.lifecycle_stage == "deleted" or self._deleted[experiment]


def metric_method(name: str) -> str:
    """A contender's name as people know it, from the name of a metric: MLflow allows no `+`."""
    return re.sub(r"_pp(?![A-Za-z0-9])", "++", name)


def _stages(runs: Sequence[Any]) -> tuple[RunRecord, ...]:
    records = [_record(run) for run in runs if run.data.tags.get(STAGE, "chain") != "chain"]
    return tuple(sorted(records, key=lambda run: -run.started))


def _chain_name(run: Any) -> str:
    return str(run.data.tags.get(CHAIN, "").partition("@")[0] or run.info.run_name)


def _record(run: Any) -> RunRecord:
    tags, data = dict(run.data.tags), run.data
    part = tags.get(PART, "-")
    inputs = tuple(Input(one.dataset.name, one.dataset.digest, one.dataset.source)
                   for one in (run.inputs.dataset_inputs if run.inputs else ()))
    return RunRecord(run.info.run_id, _chain_name(run), tags.get(STAGE, ""), None if part == "-" else part, tags.get(PARENT),
                     run.info.status, run.info.start_time / 1e3, run.info.end_time / 1e3 if run.info.end_time else None,
                     dict(data.params), dict(data.metrics), tags, inputs)


def _text(client: MlflowClient, run_id: str, path: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run_id, path, folder)).read_text(encoding="utf-8")
        except (InputError, StoppedError):
            raise
        except Exception:  # each kind of store raises its own exceptions
            return None


def _whole(text: str | None, params: Mapping[str, str]) -> dict[str, str]:
    """`text`: of the artifact with the configuration, None if there is none; `params`: of the run, of which those count beside
    that artifact that are no settings."""
    recorded = {given_name(metric_method(name)): value for name, value in params.items()}
    own = {name: value for name, value in recorded.items() if name.split(".")[0] not in RunConfig.model_fields}
    return recorded if text is None else own | _flattened(text)


def _flattened(text: str) -> dict[str, str]:
    """A recorded configuration by dotted names. One that this version reads has its defaults too; one that it does not read is
    taken as it stands."""
    with suppress(yaml.YAMLError):
        values = yaml.safe_load(text)
        if isinstance(values, dict):
            with suppress(ValidationError, InputError):
                values = RunConfig.model_validate(values).model_dump(mode="json", by_alias=True)
            return {given_name(name): value for name, value in _flat(values).items()}
    return {}


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    """`flatten`, with names of drafters as they are given."""
    return {metric_method(name): value for name, value in flatten(values).items()}


def given_name(dotted: str) -> str:
    """`section.setting` under the name that a user gives now: earlier names and names of fields are others."""
    section, _, name = present_name(dotted).partition(".")
    known = RunConfig.model_fields.get(section)
    setting = getattr(known.annotation, "model_fields", {}).get(name) if known else None
    return f"{section}.{setting.alias}" if setting is not None and setting.alias else present_name(dotted)
