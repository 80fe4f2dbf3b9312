"""The records of a run, as plain values that a file can hold, and how each is sent to MLflow.

A record that is sent again changes nothing: a metric with the same step, time and value is the same one, a parameter that is
there stays, tags, artifacts and the end replace what is there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError, StoppedError
from pipelines.runtime.faults import first_line
from pipelines.runtime.provenance import without_credentials
from pipelines.tracking.client import (
    AwayError,
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    Metric,
    MlflowClient,
    Param,
    RunTag,
    is_refusal,
)

PARAMS_AT_ONCE = 100
METRICS_AT_ONCE = 1000
Record = Mapping[str, Any]


def send_record(client: MlflowClient, run_id: str, record: Record, source: Path | None = None) -> None:
    """Send one record of the run `run_id`, or of the one that it names itself. `source`: the file or folder of an artifact, on
    this machine.

    Raises AwayError for a store that does not take it now, InputError for one that refuses it, StoppedError for a run that was
    deleted.
    """
    _SENDERS[record["kind"]](client, record.get("run_id", run_id), record, source)


def _metrics(client: MlflowClient, run_id: str, record: Record, _: Path | None) -> None:
    """`metrics`: (name, value, milliseconds since 1970, step) of each, and further arguments of `Metric`."""
    entries = [Metric(*entry) for entry in record["metrics"]]
    for start in range(0, len(entries), METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=entries[start:start + METRICS_AT_ONCE])


def _params(client: MlflowClient, run_id: str, record: Record, _: Path | None) -> None:
    logged = client.get_run(run_id).data.params
    entries = [Param(key, value) for key, value in record["params"].items() if key not in logged]
    for start in range(0, len(entries), PARAMS_AT_ONCE):
        client.log_batch(run_id, params=entries[start:start + PARAMS_AT_ONCE])


def _tags(client: MlflowClient, run_id: str, record: Record, _: Path | None) -> None:
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in record["tags"].items()])


def _dataset(client: MlflowClient, run_id: str, record: Record, _: Path | None) -> None:
    dataset = Dataset(name=record["name"], digest=record["digest"], source_type="local", source=record["path"])
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])])


def _artifact(client: MlflowClient, run_id: str, record: Record, source: Path | None) -> None:
    assert source is not None
    log = client.log_artifacts if source.is_dir() else client.log_artifact
    with _one_line(client, run_id):
        log(run_id, str(source), record["artifact_path"])


def _model_files(client: MlflowClient, run_id: str, record: Record, source: Path | None) -> None:
    with _one_line(client, run_id):
        client.log_model_artifacts(record["model_id"], str(source), record["path"])


def _output(client: MlflowClient, run_id: str, record: Record, _: Path | None) -> None:
    client.log_outputs(run_id, [LoggedModelOutput(record["model_id"], 0)])


def _text(client: MlflowClient, run_id: str, record: Record, _: Path | None) -> None:
    with _one_line(client, run_id):
        client.log_text(run_id, record["text"], record["file"])


def _end(client: MlflowClient, run_id: str, record: Record, _: Path | None) -> None:
    for one in (run_id, record["parent"]):
        if one is not None:
            client.set_terminated(one, record["status"], record["time"])


_SENDERS: dict[str, Callable[[MlflowClient, str, Record, Path | None], None]] = {
    "metrics": _metrics, "params": _params, "tags": _tags, "dataset": _dataset, "artifact": _artifact, "text": _text,
    "model_files": _model_files, "output": _output, "end": _end}


@contextmanager
def _one_line(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Tell in one line that artifacts cannot be stored, now or at all. A full disk is told by who prints errors."""
    try:
        yield
    except (StoppedError, InputError):
        raise
    except Exception as error:  # each kind of store raises its own exceptions
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = without_credentials(client.get_run(run_id).info.artifact_uri)
        if not is_refusal(error):
            raise AwayError(f"tracking.experiment: its artifacts cannot be stored in {where} now "
                            f"({first_line(error)[:200]}): run the same command again when that is mended") from None
        raise InputError(f"tracking.experiment: its artifacts cannot be stored in {where} "
                         f"({first_line(error)[:200]}): choose another "
                         "tracking.experiment, or correct the server's artifact root") from None
