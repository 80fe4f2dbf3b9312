"""Search for finished runs in MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.tracking.address import tracking_uri
from pipelines.tracking.client import open_client


@dataclass(frozen=True)
class RunRecord:
    """A run in MLflow. `params`: the resolved configuration, flattened."""

    run_id: str
    name: str
    params: dict[str, str]
    metrics: dict[str, float]


def find_benches(config: RunConfig, runs: Sequence[str]) -> list[RunRecord]:
    """The bench of each of `runs`: a run id of a bench, a run id of a chain, or the name of a chain (its latest bench).

    Raises InputError for a run without a finished bench.
    """
    client = open_client(tracking_uri(config))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = []
    for run in runs:
        quoted = run.replace("'", "")
        benches: list[Any] = []
        for wanted in (f"attributes.run_id = '{quoted}'", f"tags.`mlflow.parentRunId` = '{quoted}'",
                       f"tags.`hydra_heads.chain` LIKE '{quoted}@%'"):
            benches = benches or client.search_runs(
                experiments, filter_string=f"{wanted} and tags.`hydra_heads.stage` = 'bench' and attributes.status = 'FINISHED'",
                order_by=["attributes.start_time DESC"], max_results=1)
        if not benches:
            raise InputError(f"compare.runs: {run!r} is no finished bench, nor a run that has one: see `mlflow ui`")
        data = benches[0].data
        name = data.tags.get("hydra_heads.chain", run).rpartition("@")[0]
        found.append(RunRecord(benches[0].info.run_id, name, dict(data.params), dict(data.metrics)))
    return found
