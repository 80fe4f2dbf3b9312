"""Runs of MLflow: a parent run for each chain of stages, and a child run for each stage and drafter.

All calls go through `MlflowClient` with explicit run ids: MLflow's active runs belong to a process, and stages use several.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import as_path, local_copy
from pipelines.config import RunConfig
from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line
from pipelines.runtime.provenance import HIDDEN, is_secret, shareable_yaml, without_credentials
from pipelines.tracking.address import tracking_uri
from pipelines.tracking.client import DATABASES, MlflowClient, MlflowException, get_current_time_millis, open_client
from pipelines.tracking.pages import (
    DEVICE_SECONDS,
    HEADLINE,
    NOTE,
    description,
    devices,
    log_device_seconds,
    prepare_experiment,
    update_chain,
)
from pipelines.tracking.records import Record, send_record
from pipelines.tracking.run_tags import run_tags
from pipelines.tracking.spool import Spool, send_unsent, unsent_folder
from pipelines.tracking.stage_settings import chain_settings, stage_settings

LONGEST_PARAM = 500
LONGEST_DIGEST = 36
"""Characters of a data set's digest."""
PROBE_SECONDS = 30.0
"""Longest wait for a store of artifacts to take a small file, before work begins."""


class Run:
    """One MLflow run; a context manager that ends it as FINISHED, or as FAILED after an exception.

    `parent` ends with the same status, as no other child runs at the same time; `ended`: called then.
    """

    def __init__(self, client: MlflowClient, run_id: str, parent: str | None = None,
                 ended: Callable[[], None] | None = None) -> None:
        self._client, self.run_id, self._parent, self._ended = client, run_id, parent, ended
        self._spool: Spool | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.end("FAILED" if kind else "FINISHED")
        except Exception as error:  # the work is done, or has failed for a reason that matters more
            say("tracking", f"the end of run {self.run_id} is not recorded: {first_line(error)}")
        try:
            if self._ended is not None:
                self._ended()
        except Exception as error:
            say("tracking", f"the page of this run's chain is not up to date: {first_line(error)}")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a step; other characters of a name than letters, digits and . _ - / are replaced."""
        self.log_curve([(step or 0, metrics)])

    def log_curve(self, points: Sequence[tuple[int, Mapping[str, float]]], times: Sequence[float] | None = None) -> None:
        """Log numbers at several steps, with as many in a call as a store accepts: a call takes as long as a step of training.

        `times`: of each point, in seconds since 1970, default now. A point that is logged again with the same time is there once.
        """
        now = [get_current_time_millis()] * len(points) if times is None else [round(1000 * time) for time in times]
        self._put({"kind": "metrics", "metrics": [
            [_clean(name), float(value), when, step] for (step, metrics), when in zip(points, now, strict=True)
            for name, value in metrics.items()]})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested values, flattened. Params are immutable: those that are logged already do not change."""
        self._put({"kind": "params", "params": flatten(params)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, in place of earlier values."""
        self._put({"kind": "tags", "tags": dict(tags)})

    def log_dataset(self, name: str, digest: str, path: str, context: str, of_chain: bool = False) -> None:
        """Log an input by name, digest and path; `of_chain`: of the chain's run too."""
        for run_id in (self.run_id, self._parent) if of_chain else (self.run_id,):
            if run_id is not None:
                self._put({"kind": "dataset", "run_id": run_id, "name": name, "digest": digest[:LONGEST_DIGEST], "path": path,
                           "context": context})

    def describe(self, headline: str, body: str = "", pictures: Sequence[str] = ()) -> None:
        """Write the run's description: its result in one line, pictures among its artifacts, and tables in Markdown."""
        self.set_tags({HEADLINE: headline, NOTE: description(self.run_id, headline, body, pictures)})

    def log_headline(self, metrics: Mapping[str, float | None], tags: Mapping[str, str] | None = None, *,
                     model_id: str | None = None) -> None:
        """Log figures that a whole chain is judged by, in the chain's run; None is left out. See `pages.HEADLINE_METRICS`.

        `model_id`: the `LoggedModel` that the chain has made."""
        if self._parent is None:
            return
        if model_id is not None:
            self._put({"kind": "output", "run_id": self._parent, "model_id": model_id})
        now = get_current_time_millis()
        self._put({"kind": "metrics", "run_id": self._parent, "metrics": [
            [name, float(value), now, 0] for name, value in metrics.items() if value is not None]})
        self._put({"kind": "tags", "run_id": self._parent, "tags": dict(tags or {})})

    def log_artifact(self, path: Path | str, artifact_path: str | None = None) -> None:
        """Log a file, or the contents of a folder, under `artifact_path`. Raises InputError if the store of artifacts refuses."""
        self._put({"kind": "artifact", "artifact_path": artifact_path}, local_copy(path))

    @property
    def client(self) -> MlflowClient:
        """The client of the store that this run is in."""
        return self._client

    def log_model_files(self, model_id: str, folder: Path, path: str | None = None) -> None:
        """Store the contents of a folder among the files of a `LoggedModel`, under `path`. Raises as `log_artifact` does."""
        self._put({"kind": "model_files", "model_id": model_id, "path": path}, folder)

    def log_model_metrics(self, model_id: str, metrics: Mapping[str, float | None], dataset: str, digest: str) -> None:
        """Log figures of a `LoggedModel` that were measured on the data `dataset`; None is left out. The run gets them too: what
        it logs afterwards under the same name counts for the run."""
        now = get_current_time_millis() - 1
        self._put({"kind": "metrics", "metrics": [
            [_clean(name), float(value), now, 0, model_id, dataset, digest[:LONGEST_DIGEST]]
            for name, value in metrics.items() if value is not None]})

    def artifact_uri(self, path: str) -> str:
        """The address of an artifact of this run."""
        return f"{self._client.get_run(self.run_id).info.artifact_uri}/{path}"

    def log_text(self, text: str, file: str) -> None:
        """Log a text as the artifact `file`. Raises InputError if the store of artifacts refuses."""
        self._put({"kind": "text", "text": text, "file": file})

    def end(self, status: str = "FINISHED") -> None:
        """End the run and its parent. What a server that is away has not got yet is sent, or told in one line."""
        try:
            self._put({"kind": "end", "status": status, "time": get_current_time_millis(), "parent": self._parent})
        finally:
            if self._spool is not None:
                self._spool.close()

    def keep_unsent(self, config: RunConfig, uri: str) -> Run:
        """From now on keep, instead of raising, what the store at `uri` does not take because it is away."""
        self._spool = Spool(uri, self._client, self.run_id, unsent_folder(config), as_path(config.storage))
        return self

    def require_sent(self) -> None:
        """Raise StoppedError unless MLflow has all that was logged: for what refers to it there."""
        if self._spool is not None and not self._spool.send():
            raise StoppedError(f"tracking.uri: MLflow does not answer, and has not got all of run {self.run_id}: run the same "
                               "command again when it does")

    def _put(self, record: Record, source: Path | None = None) -> None:
        if self._spool is not None:
            self._spool.put(record, source)
        else:
            send_record(self._client, self.run_id, record, source)


@contextmanager
def work_goes_on(what: str) -> Iterator[None]:
    """Tell in one line that `what`, which only MLflow's pages show, is not recorded as the server is away, and go on."""
    try:
        yield
    except StoppedError as error:
        say("tracking", f"{what}: not recorded: {error}")


class Tracker:
    """The runs of one chain, for the driver: its experiment, its parent run, its child runs."""

    def __init__(self, config: RunConfig, client: MlflowClient, uri: str, experiment_id: str) -> None:
        self.uri, self.experiment_id = uri, experiment_id
        self._config, self._client = config, client
        self._parent: str | None = None
        self._chain = f"{config.name}@{config.storage}".replace("'", "")

    @classmethod
    def open(cls, config: RunConfig) -> Tracker:
        """Connect. Raises StoppedError within seconds if the server does not answer, or its store of artifacts, InputError for an
        experiment that was deleted and for a store of artifacts that refuses to take any."""
        tracker = cls._connect(config)
        tracker._prepare()
        return tracker

    @classmethod
    def _connect(cls, config: RunConfig) -> Tracker:
        uri = tracking_uri(config)
        client = open_client(uri)
        send_unsent(config, uri, client)
        name = config.tracking.experiment
        found = client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                raise InputError(f"tracking.experiment={name}: was deleted: restore it (`mlflow experiments restore "
                                 f"--experiment-id {found.experiment_id}`) or choose another name")
            return cls(config, client, uri, found.experiment_id)
        location = None
        if urlsplit(uri).scheme.split("+")[0] in DATABASES:  # MLflow's default is relative to the folder that a worker runs in
            location = (as_path(config.storage) / "mlflow" / "artifacts").as_uri()
        try:
            return cls(config, client, uri, client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another process has created it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            return cls(config, client, uri, found.experiment_id)

    def _prepare(self) -> None:
        """Give the experiment its page, and store the configuration as an artifact of the chain's run: what cannot be stored is
        told before the work, not after it. A store that is not there may keep its library waiting for many minutes, so it gets
        `PROBE_SECONDS`."""
        prepare_experiment(self._client, self.experiment_id)
        run, faults = Run(self._client, self.parent()), list[BaseException]()

        def store() -> None:
            try:
                run.log_text(shareable_yaml(self._config), "config.yaml")
            except BaseException as error:
                faults.append(error)

        thread = threading.Thread(target=store, daemon=True)
        thread.start()
        thread.join(PROBE_SECONDS)
        if thread.is_alive():
            raise StoppedError(f"tracking.uri={without_credentials(self.uri)}: its store of artifacts does not answer within "
                               f"{PROBE_SECONDS:.0f} s: run the same command again when that is mended")
        if faults:
            raise faults[0]

    def parent(self) -> str:
        """Run id of the chain's parent run, which is found by its tag, or created. Asked again, it needs no server."""
        if self._parent is None:
            self._parent = self._find_parent()
        return self._parent

    def _find_parent(self) -> str:
        runs = self._client.search_runs([self.experiment_id], max_results=1, filter_string=(
            f"tags.`hydra_heads.chain` = '{self._chain}' and tags.`hydra_heads.stage` = 'chain'"))
        if runs:
            return runs[0].info.run_id
        tags = self._tags("chain") | run_tags(self._config) | {"mlflow.source.name": f"hydra-heads {self._config.name}"}
        made = self._client.create_run(self.experiment_id, tags=tags, run_name=self._config.name).info.run_id
        self._client.set_terminated(made)  # it is RUNNING while a child runs
        return made

    def start(self, stage: str, part: str | None = None, params: Mapping[str, Any] | None = None,
              fingerprint: str | None = None) -> Run:
        """Start a child run, or continue an unfinished one of the same stage, part and fingerprint.

        Its params are the settings that its stage reads and `params`; the whole configuration is its artifact `config.yaml`.
        """
        parent = self.parent()
        tags = self._tags(stage) | {"mlflow.parentRunId": parent, "hydra_heads.part": part or "-",
                                    "hydra_heads.fingerprint": fingerprint or "-"}
        about = run_tags(self._config) | {"mlflow.source.name": f"hydra-heads {stage}"}
        found = self._unfinished(tags) if fingerprint else None
        if found is None:
            name = f"{stage}: {part}" if part else stage
            found = self._client.create_run(self.experiment_id, tags=tags | about, run_name=name).info.run_id
        for run_id in (parent, found):
            self._client.update_run(run_id, status="RUNNING")
        run = Run(self._client, found, parent, self._ending(stage, found, parent))
        run.set_tags(about)  # those of an unfinished run are of an earlier command
        run.log_params(stage_settings(self._config, stage, part) | dict(params or {}))
        run.log_text(shareable_yaml(self._config), "config.yaml")
        Run(self._client, parent).log_params(chain_settings(self._config, stage))
        return run.keep_unsent(self._config, self.uri)

    def _tags(self, stage: str) -> dict[str, str]:
        return {"hydra_heads.chain": self._chain, "hydra_heads.name": self._config.name, "hydra_heads.stage": stage}

    def _ending(self, stage: str, run_id: str, parent: str) -> Callable[[], None]:
        """What is written when a stage's run has ended: its device-seconds, and the chain's page."""
        before = self._client.get_run(run_id).data.metrics.get(DEVICE_SECONDS, 0.0)
        began = time.monotonic()

        def write() -> None:
            log_device_seconds(self._client, run_id, (time.monotonic() - began) * devices(self._config, stage), before)
            update_chain(self._client, self.experiment_id, parent, self._config.name)

        return write

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

    def log_curve(self, points: Sequence[tuple[int, Mapping[str, float]]], times: Sequence[float] | None = None) -> None:
        """As `Run.log_curve`."""
        self._run.log_curve(points, times)


def metric_logger(uri: str, run_id: str) -> MetricLogger:
    """A logger for the run `run_id` of the store at `uri`. Raises InputError and StoppedError as `open_client` does."""
    return MetricLogger(uri, run_id)


def log_or_keep(config: RunConfig, uri: str, run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """Log numbers at a step from a worker that may end before a server that is away answers again: then they are kept for the
    driver, or the next command of the run."""
    now = get_current_time_millis()
    spool = Spool(uri, None, run_id, unsent_folder(config), as_path(config.storage))
    try:
        spool.put({"kind": "metrics", "metrics": [[_clean(name), float(value), now, step] for name, value in metrics.items()]})
    finally:
        spool.close()


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
