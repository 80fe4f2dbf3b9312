"""The plain CronJob of the nightly batch."""

from __future__ import annotations

from pipelines.manifests.jobs import command, night_words
from pipelines.manifests.pods import POD_USER, SAFE, environment, environment_secrets, resources, volumes
from pipelines.manifests.target import APP, SERVE_PORT, Json, Target, labels, resource

START_SECONDS, RUN_SECONDS = 4 * 3600, 17 * 3600
"""A missed start is made up for so long, and a run may take so long: both end before midnight of a schedule at 02:00."""
KEY_VARIABLE = "BATCH_API_KEY"


def cron_job(target: Target) -> Json:
    """Yesterday's prompts every night through the endpoint: a client over HTTP, which needs no GPU and no Ray."""
    mounts, found = volumes(target)
    words = [*night_words(target), f"batch.address=http://{APP}-serve-svc:{SERVE_PORT}", f"batch.key_variable={KEY_VARIABLE}"]
    key = {"name": KEY_VARIABLE, "valueFrom": {"secretKeyRef": {"name": f"{APP}-keys", "key": "batch"}}}
    container = {"name": "batch", "image": target.image, "command": command(target, "batch", *words).split(),
                 "env": [*environment(target), key], "envFrom": environment_secrets(), "resources": resources(1, "4Gi"),
                 "securityContext": SAFE, "volumeMounts": mounts}
    pod = {"metadata": {"labels": labels("nightly")},
           "spec": {"serviceAccountName": f"{APP}-ray", "automountServiceAccountToken": False, "restartPolicy": "Never",
                    "securityContext": dict(POD_USER), "containers": [container], "volumes": found}}
    return resource(target, "batch/v1", "CronJob", f"{APP}-nightly", "nightly", spec={
        "schedule": target.config.cluster.schedule, "timeZone": "Etc/UTC", "startingDeadlineSeconds": START_SECONDS,
        "concurrencyPolicy": "Forbid", "successfulJobsHistoryLimit": 3, "failedJobsHistoryLimit": 5,
        "jobTemplate": {"spec": {"backoffLimit": 2, "activeDeadlineSeconds": RUN_SECONDS, "template": pod}}})
