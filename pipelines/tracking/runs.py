"""Runs of MLflow: a parent run for each chain of stages, and a child run for each stage and drafter.

All calls go through `MlflowClient` with explicit run ids: MLflow's active runs belong to a process, and stages use several.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig
from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line
from pipelines.runtime.provenance import HIDDEN, is_secret, shareable_yaml, without_credentials
from pipelines.tracking.address import tracking_uri
from pipelines.tracking.client import (
    DATABASES,
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    MlflowClient,
    MlflowException,
    Param,
    get_current_time_millis,
    is_refusal,
    open_client,
)

LONGEST_PARAM = 500
PARAMS_AT_ONCE = 100
METRICS_AT_ONCE = 1000


class Run:
    """One MLflow run; a context manager that ends it as FINISHED, or as FAILED after an exception.

    `parent` ends with the same status, as no other child runs at the same time.
    """

    def __init__(self, client: MlflowClient, run_id: str, parent: str | None = None) -> None:
        self._client, self.run_id, self._parent = client, run_id, parent

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.end("FAILED" if kind else "FINISHED")
        except Exception as error:  # the work is done, or has failed for a reason that matters more
            say("tracking", f"the end of run {self.run_id} is not recorded: {first_line(error)}")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a step; other characters of a name than letters, digits and . _ - / are replaced."""
        self.log_curve([(step or 0, metrics)])

    def log_curve(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log numbers at several steps, with as many in a call as a store accepts: a call takes as long as a step of training."""
        now = get_current_time_millis()
        entries = [Metric(_clean(name), float(value), now, step) for step, metrics in points for name, value in metrics.items()]
        for start in range(0, len(entries), METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=entries[start:start + METRICS_AT_ONCE])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested values, flattened. Params are immutable: those that are logged already do not change."""
        logged = self._client.get_run(self.run_id).data.params
        entries = [Param(key, value) for key, value in flatten(params).items() if key not in logged]
        for start in range(0, len(entries), PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, params=entries[start:start + PARAMS_AT_ONCE])

    def log_dataset(self, name: str, digest: str, path: str, context: str) -> None:
        """Log an input by name, digest and path."""
        dataset = Dataset(name=name, digest=digest[:36], source_type="local", source=path)
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_artifact(self, path: Path | str, artifact_path: str | None = None) -> None:
        """Log a file, or the contents of a folder, under `artifact_path`. Raises InputError if the store of artifacts refuses."""
        log = self._client.log_artifacts if Path(path).is_dir() else self._client.log_artifact
        with self._artifacts():
            log(self.run_id, str(path), artifact_path)

    def artifact_uri(self, path: str) -> str:
        """The address of an artifact of this run."""
        return f"{self._client.get_run(self.run_id).info.artifact_uri}/{path}"

    def log_text(self, text: str, file: str) -> None:
        """Log a text as the artifact `file`. Raises InputError if the store of artifacts refuses."""
        with self._artifacts():
            self._client.log_text(self.run_id, text, file)

    @contextmanager
    def _artifacts(self) -> Iterator[None]:
        """Tell in one line that artifacts cannot be stored, now or at all. A full disk is told by who prints errors."""
        try:
            yield
        except (StoppedError, InputError):
            raise
        except Exception as error:  # each kind of store raises its own exceptions
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = without_credentials(self._client.get_run(self.run_id).info.artifact_uri)
            if not is_refusal(error):
                raise StoppedError(f"tracking.experiment: its artifacts cannot be stored in {where} now "
                                   f"({first_line(error)[:200]}): run the same command again when that is mended") from None
            raise InputError(f"tracking.experiment: its artifacts cannot be stored in {where} "
                             f"({first_line(error)[:200]}): choose another "
                             "tracking.experiment, or correct the server's artifact root") from None

    def end(self, status: str = "FINISHED") -> None:
        for run_id in (self.run_id, self._parent):
            if run_id is not None:
                self._client.set_terminated(run_id, status)


class Tracker:
    """The runs of one chain, for the driver: its experiment, its parent run, its child runs."""

    def __init__(self, config: RunConfig, client: MlflowClient, uri: str, experiment_id: str) -> None:
        self.uri, self.experiment_id = uri, experiment_id
        self._config, self._client = config, client
        self._chain = f"{config.name}@{config.storage}"

    @classmethod
    def open(cls, config: RunConfig) -> Tracker:
        """Connect. Raises StoppedError within seconds if the server does not answer, InputError for an experiment that was
        deleted."""
        uri = tracking_uri(config)
        client = open_client(uri)
        name = config.tracking.experiment
        found = client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                raise InputError(f"tracking.experiment={name}: was deleted: restore it (`mlflow experiments restore "
                                 f"--experiment-id {found.experiment_id}`) or choose another name")
            return cls(config, client, uri, found.experiment_id)
        location = None
        if urlsplit(uri).scheme.split("+")[0] in DATABASES:  # MLflow's default is relative to the folder that a worker runs in
            location = (Path(config.storage) / "mlflow" / "artifacts").as_uri()
        try:
            return cls(config, client, uri, client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another process has created it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            return cls(config, client, uri, found.experiment_id)

    def parent(self) -> str:
        """Run id of the chain's parent run, which is found by its tag, or created."""
        quoted = self._chain.replace("'", "")
        runs = self._client.search_runs([self.experiment_id], max_results=1, filter_string=(
            f"tags.`hydra_heads.chain` = '{quoted}' and tags.`hydra_heads.stage` = 'chain'"))
        if runs:
            return runs[0].info.run_id
        tags = {"hydra_heads.chain": quoted, "hydra_heads.stage": "chain"}
        made = self._client.create_run(self.experiment_id, tags=tags, run_name=self._config.name).info.run_id
        self._client.set_terminated(made)  # it is RUNNING while a child runs
        return made

    def start(self, stage: str, part: str | None = None, params: Mapping[str, Any] | None = None,
              fingerprint: str | None = None) -> Run:
        """Start a child run, or continue an unfinished one of the same stage, part and fingerprint.

        Its params are the resolved configuration and `params`; the configuration is also its artifact `config.yaml`.
        """
        parent = self.parent()
        tags = {"mlflow.parentRunId": parent, "hydra_heads.stage": stage, "hydra_heads.part": part or "-",
                "hydra_heads.fingerprint": fingerprint or "-", "hydra_heads.chain": self._chain.replace("'", "")}
        found = self._unfinished(tags) if fingerprint else None
        if found is None:
            name = f"{stage}: {part}" if part else stage
            found = self._client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id
        for run_id in (parent, found):
            self._client.update_run(run_id, status="RUNNING")
        run = Run(self._client, found, parent)
        run.log_params(self._config.model_dump(mode="json") | dict(params or {}))
        run.log_text(shareable_yaml(self._config), "config.yaml")
        return run

    def history(self, run_id: str, metrics: Sequence[str]) -> dict[int, dict[str, float]]:
        """Step -> last part of a metric's name -> value at that step."""
        found: dict[int, dict[str, float]] = {}
        for name in metrics:
            for point in self._client.get_metric_history(run_id, _clean(name)):
                found.setdefault(point.step, {})[name.rpartition(".")[2]] = point.value
        return found

    def end_parent(self, status: str = "FINISHED") -> None:
        self._client.set_terminated(self.parent(), status)

    def _unfinished(self, tags: Mapping[str, str]) -> str | None:
        keys = ("mlflow.parentRunId", "hydra_heads.stage", "hydra_heads.part", "hydra_heads.fingerprint")
        wanted = " and ".join(f"tags.`{key}` = '{tags[key]}'" for key in keys)
        runs = self._client.search_runs([self.experiment_id], filter_string=wanted, max_results=10)
        open_runs = [run for run in runs if run.info.status != "FINISHED"]
        return open_runs[0].info.run_id if open_runs else None


class MetricLogger:
    """Logs metrics from a Ray worker, which has only the uri and the run id."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._run = Run(open_client(uri), run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log_metrics(metrics, step)

    def log_curve(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        self._run.log_curve(points)


def metric_logger(uri: str, run_id: str) -> MetricLogger:
    """A logger for the run `run_id` of the store at `uri`. Raises InputError and StoppedError as `open_client` does."""
    return MetricLogger(uri, run_id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to dotted keys with texts, cut to a length that every MLflow store accepts; secrets are hidden."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{_clean(str(key))}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif is_secret(name) and value:
            flat[name] = HIDDEN
        else:
            text = without_credentials(str(value))
            flat[name] = text if len(text) <= LONGEST_PARAM else text[:LONGEST_PARAM - 3] + "..."
    return flat


def _clean(name: str) -> str:
    """Replace the characters that MLflow does not allow in names, such as `+`."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", name.replace("++", "_pp"))
