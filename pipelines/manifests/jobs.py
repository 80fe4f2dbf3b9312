"""RayJobs: one for each stage, one for the chain, and the RayCronJobs of the nightly batch and of the loop."""

from __future__ import annotations

from pipelines.manifests.launcher import RUNTIME_VARIABLES
from pipelines.manifests.pods import POD_USER, SAFE
from pipelines.manifests.ray_cluster import ray_cluster
from pipelines.manifests.target import APP, CHAIN, Json, Target, resource
from pipelines.manifests.yaml_text import to_yaml

DAY = 24 * 3600
DEADLINES = {"chain": 5 * DAY, "distill": 2 * DAY, "train": 2 * DAY, "ablate": 7 * DAY, "loop": 5 * DAY}
"""Seconds after which a job is ended; a day for the others. Run again, a stage goes on where it was."""
NIGHT_SECONDS = 21 * 3600
"""Of a night's batch: it ends before midnight, when `yesterday` becomes another day."""
KEPT_SECONDS = 3600


def jobs(target: Target) -> dict[str, Json]:
    """Name of a stage, or `chain` -> its RayJob."""
    names = ["chain", *CHAIN, "batch", "load", "loop", *(["ablate"] if target.config.ablate.variants else [])]
    return {name: ray_job(target, name) for name in names}


def command(target: Target, stage: str, *words: str) -> str:
    """The command that runs one stage in a pod."""
    return " ".join(["python", "-m", f"jobs.{stage}", "--config", target.config_path, *words])


def ray_job(target: Target, name: str) -> Json:
    """The RayJob of a stage, or of the chain, whose stages share one cluster. A stage that is finished is skipped."""
    entrypoint = (f"sh -c '{' && '.join(command(target, stage) for stage in CHAIN)}'" if name == "chain"
                  else command(target, name))
    job = resource(target, "ray.io/v1", "RayJob", f"{APP}-{name}", name,
                   spec=_spec(target, name, entrypoint, DEADLINES.get(name, DAY)))
    if target.config.cluster.queue:
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = target.config.cluster.queue
    return job


def ray_cron_job(target: Target) -> Json:
    """Yesterday's batch every night on a cluster of its own."""
    spec = _spec(target, "batch", command(target, "batch", *night_words(target)), NIGHT_SECONDS)
    return resource(target, "ray.io/v1", "RayCronJob", f"{APP}-nightly", "nightly",
                    spec={"schedule": target.config.cluster.schedule, "timeZone": "Etc/UTC", "jobTemplate": spec})


def loop_cron_job(target: Target) -> Json:
    """A turn of the loop now and then, on a cluster of its own. One that is not finished goes on when it is started again by hand
    with its partition."""
    return resource(target, "ray.io/v1", "RayCronJob", f"{APP}-loop", "loop", spec={
        "schedule": target.config.cluster.loop_schedule, "timeZone": "Etc/UTC",
        "jobTemplate": _spec(target, "loop", command(target, "loop"), DEADLINES["loop"])})


def night_words(target: Target) -> list[str]:
    """The overrides that make `batch` answer yesterday's prompts."""
    cluster = target.config.cluster
    root = (cluster.mount if target.has_volume else target.config.storage).rstrip("/")
    return ["batch.partition=yesterday", f"batch.input={root}/{cluster.batch_input}",
            f"batch.output={root}/{cluster.batch_output}"]


def _spec(target: Target, name: str, entrypoint: str, seconds: int) -> Json:
    spot = target.config.cluster.spot_label is not None
    return {
        "entrypoint": entrypoint,
        "submissionMode": "K8sJobMode",
        "backoffLimit": 5 if spot else 1,
        "activeDeadlineSeconds": seconds,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_SECONDS,
        "runtimeEnvYAML": to_yaml({"env_vars": RUNTIME_VARIABLES}),
        "submitterPodTemplate": {"spec": {
            "serviceAccountName": f"{APP}-ray", "automountServiceAccountToken": False, "restartPolicy": "Never",
            "securityContext": dict(POD_USER), "containers": [{
                "name": "submitter", "image": target.image, "securityContext": SAFE,
                "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}}]}},
        "rayClusterSpec": ray_cluster(target, name, target.nodes_for(name))}
