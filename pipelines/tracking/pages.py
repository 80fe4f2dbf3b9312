"""What MLflow's pages show of a run at first sight: source, commit, user, description; of a chain also its headline figures.

People compare runs there. A stage's run has a few figures, under names that all stages share, and a description with the table of
its report; details are in its artifacts. The chain's run, the only one that MLflow's table shows at first, has the figures that a
chain is judged by (`HEADLINE_METRICS`), the settings that people vary (`stage_settings.CHAIN`) and one line for each stage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from pipelines.config import RunConfig
from pipelines.runtime.tables import Table
from pipelines.tracking.client import Metric, MlflowClient, RunTag, get_current_time_millis

NOTE, HEADLINE = "mlflow.note.content", "hydra_heads.headline"
LONGEST_NOTE = 7900
"""Characters of a description: MLflow's stores accept 8000 of a tag."""
DEVICE_SECONDS = "device_seconds"
HEADLINE_METRICS = ("speed_vs_plain", "speed_vs_plain_low", "speed_vs_plain_high", "tokens_per_step", "rows", "training_tokens",
                    DEVICE_SECONDS)
"""Figures of a chain: the last bench's fastest contender or, once there is one, the champion; rows of `distill`, response tokens
that heads were trained on, and the seconds of all devices that all stages used."""
VIEW = "chains"
"""Name of the view of an experiment that shows its chains with their figures: `#/experiments/ID/runs?viewStateShareKey=chains` in
MLflow's UI. Its own table has no column for metrics, parameters and tags until a person adds some."""
COLUMNS = ("attributes.`Source`", "attributes.`Models`", "attributes.`Dataset`", "tags.`champion`",
           *(f"metrics.`{name}`" for name in HEADLINE_METRICS), "params.`base.model`", "params.`base.dtype`", "params.`drafters`",
           "params.`prompts.count`", "params.`train.lr`", "params.`train.epochs`")
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # so that the UI opens with runs and models, not with traces
    "mlflow.experiment.primaryMetric.name": "speed_vs_plain",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    f"mlflow.sharedViewState.{VIEW}": json.dumps({
        "selectedColumns": COLUMNS, "searchFilter": "tags.`hydra_heads.stage` = 'chain'",
        "orderByKey": "metrics.`speed_vs_plain`", "orderByAsc": False}),
}
MOST_STAGES = 500
"""Runs of one chain that its description is made from."""


def prepare_experiment(client: MlflowClient, experiment_id: str) -> None:
    """Give the experiment the tags that its pages need. Those that it has stay: a person may have changed them."""
    known = client.get_experiment(experiment_id).tags
    about = (f"Chains of stages that train and compare draft heads. Their figures side by side: "
             f"[the chains](#/experiments/{experiment_id}/runs?viewStateShareKey={VIEW}). A run opens into its stages.")
    for name, value in (EXPERIMENT_TAGS | {NOTE: about}).items():
        if name not in known:
            client.set_experiment_tag(experiment_id, name, value)


def description(run_id: str, headline: str, body: str = "", pictures: Sequence[str] = ()) -> str:
    """A description in Markdown: the headline, pictures among the run's artifacts, and the report's tables, cut to whole lines
    that MLflow accepts."""
    shown = "".join(f"\n![{name}](get-artifact?{urlencode({'path': name, 'run_uuid': run_id})})\n" for name in pictures)
    return whole_lines(f"**{headline}**\n{shown}\n{body}".strip() + "\n")


def whole_lines(text: str, most: int = LONGEST_NOTE) -> str:
    """As many whole lines of `text` as have at most `most` characters; a last line says that there are more."""
    if len(text) <= most:
        return text
    more = "\n\nThe rest is in the report among the artifacts.\n"
    return text[:most - len(more)].rpartition("\n")[0] + more


def devices(config: RunConfig, stage: str) -> float:
    """How many devices a stage holds at a time: GPUs where its workers reserve some, else processes."""
    workers: Any = {"distill": config.distill.workers, "train": config.train.workers, "serve": config.serve.workers}.get(stage)
    if workers is None:
        return 1
    count = config.serve.replicas if stage == "serve" else getattr(workers, "most", workers.count)
    return float(count * (workers.gpus or 1))


def log_device_seconds(client: MlflowClient, run_id: str, seconds: float, before: float) -> None:
    """Add `seconds` to the run's device-seconds, which were `before` when it started, unless its stage has logged them itself."""
    known = client.get_run(run_id).data.metrics.get(DEVICE_SECONDS, 0.0)
    if known == before:
        now = get_current_time_millis()
        client.log_batch(run_id, metrics=[Metric(DEVICE_SECONDS, round(before + seconds, 3), now, 0)])


def update_chain(client: MlflowClient, experiment_id: str, parent: str, name: str) -> None:
    """Write the chain's device-seconds and description, from the runs of its stages."""
    stages = client.search_runs([experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{parent}'",
                                order_by=["attributes.start_time ASC"], max_results=MOST_STAGES)
    total = sum(run.data.metrics.get(DEVICE_SECONDS, 0.0) for run in stages)
    chain = client.get_run(parent)
    latest = {(run.data.tags.get("hydra_heads.stage", "-"), run.data.tags.get("hydra_heads.part", "-")): run for run in stages}
    rows = [(stage, part, run.info.status.lower(), _minutes(run), _cell(run.data.tags.get(HEADLINE, "")))
            for (stage, part), run in latest.items()]
    said = chain.data.tags.get("champion")
    title = f"{name}: champion {said}" if said else name
    text = description(parent, title, Table(("stage", "part", "status", "minutes", "result"), rows).markdown())
    client.log_batch(parent, metrics=[Metric(DEVICE_SECONDS, round(total, 3), get_current_time_millis(), 0)],
                     tags=[RunTag(NOTE, text)])


def _minutes(run: Any) -> str:
    return f"{(run.info.end_time - run.info.start_time) / 60_000:.1f}" if run.info.end_time else "-"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
