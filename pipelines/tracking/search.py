"""Search for finished runs in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra_core.errors import InputError
from pipelines.config import BenchSection, RunConfig, present_name
from pipelines.tracking.address import tracking_uri
from pipelines.tracking.client import open_client
from pipelines.tracking.runs import flatten

SEVERAL = 100
"""Benches of one chain that are looked at."""


@dataclass(frozen=True)
class RunRecord:
    """A run in MLflow. `params`: the resolved configuration, flattened."""

    run_id: str
    name: str
    params: dict[str, str]
    metrics: dict[str, float]


def find_benches(config: RunConfig, runs: Sequence[str]) -> list[RunRecord]:
    """The bench of each of `runs`: a bench's own run id, its chain's, or the chain's name.

    Where a chain has several, this is the latest one with the `bench.*` settings of `config`, if those are given and one has
    them, else the latest of all.

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
                order_by=["attributes.start_time DESC"], max_results=SEVERAL)
        if not benches:
            raise InputError(f"compare.runs: {run!r} is no finished bench, nor a run that has one: see `mlflow ui`")
        bench = next((one for one in benches if _fits(config, one.data.params)), benches[0])
        data = bench.data
        name = data.tags.get("hydra_heads.chain", run).rpartition("@")[0]
        found.append(RunRecord(bench.info.run_id, name, dict(data.params), dict(data.metrics)))
    return found


def _fits(config: RunConfig, params: Mapping[str, str]) -> bool:
    """Whether a bench was run with the `bench.*` settings that are given; without any no bench does."""
    wanted = flatten({"bench": config.bench.model_dump(mode="json")})
    found = {present_name(name): value for name, value in params.items()}
    return config.bench != BenchSection() and all(found.get(name) == value for name, value in wanted.items())
