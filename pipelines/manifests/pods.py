"""The pods of a Ray cluster: user, environment, volumes, and how they end."""

from __future__ import annotations

from pipelines.manifests.target import (
    APP,
    CONFIG_FOLDER,
    DASHBOARD_PORT,
    GCS_PORT,
    KEYS_FOLDER,
    METRICS_PORT,
    SERVE_PORT,
    Json,
    Target,
    labels,
)

USER = 1000
"""The image's own user, who is not root."""
REMOVE_SECONDS = 90
"""After its answers are finished, an endpoint's pod has so long to remove its replicas."""
PORTS = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "client": 10001, "serve": SERVE_PORT, "metrics": METRICS_PORT}
SAFE = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""Security context of every container."""
POD_USER = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"}}
STAY = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""Annotations that keep a node for as long as a job's pod runs there."""


def secret_env(name: str, secret: str, key: str) -> Json:
    """A variable from a secret; without the secret it is left out."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}


def environment(target: Target) -> list[Json]:
    """Variables of every pod that runs a stage or decodes."""
    found: list[Json] = [secret_env("HF_TOKEN", "hf-token", "token")]
    if target.has_volume:  # downloaded once, for all pods
        found.insert(0, {"name": "HF_HOME", "value": f"{target.config.cluster.mount.rstrip('/')}/hf"})
    if target.tracking_uri:
        found.append({"name": "MLFLOW_TRACKING_URI", "value": target.tracking_uri})
    return found


def environment_secrets() -> list[Json]:
    """Secrets whose keys are variables: access to S3, and to an MLflow server that asks for a password."""
    return [{"secretRef": {"name": name, "optional": True}} for name in (f"{APP}-s3", f"{APP}-mlflow")]


def volumes(target: Target, keys: bool = False) -> tuple[list[Json], list[Json]]:
    """(mounts, volumes) of a pod that runs a stage; `keys`: with the endpoint's API keys."""
    mounts: list[Json] = [{"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True}]
    found: list[Json] = [{"name": "config", "configMap": {"name": f"{APP}-run"}}]
    if target.has_volume:
        mounts.append({"name": "shared", "mountPath": target.config.cluster.mount})
        found.append({"name": "shared", "persistentVolumeClaim": {"claimName": target.config.cluster.claim}})
    if keys:  # readable for the pod's user alone, whose group the platform adds
        mounts.append({"name": "keys", "mountPath": KEYS_FOLDER, "readOnly": True})
        found.append({"name": "keys", "secret": {"secretName": f"{APP}-keys", "defaultMode": 0o400}})
    return mounts, found


def resources(cpus: float, memory: str, gpus: int = 0, gpu_resource: str = "") -> Json:
    """Requests and limits, which are the same: nothing of a pod is lent to another."""
    size = {"cpu": f"{cpus:g}", "memory": memory} | ({gpu_resource: str(gpus)} if gpus else {})
    return {"requests": size, "limits": dict(size)}


def head_pod(target: Target, component: str, serves: bool = False) -> Json:
    """The template of a head pod."""
    cluster = target.config.cluster
    ports = [{"name": name, "containerPort": port} for name, port in PORTS.items() if serves or name != "serve"]
    pod = _pod(target, component, "ray-head", resources(cluster.head_cpus, cluster.head_memory), ports, serves)
    if serves and cluster.scales:  # the autoscaler beside it asks the API server for pods
        pod["spec"]["automountServiceAccountToken"] = True
    return pod


def worker_pod(target: Target, component: str, serves: bool = False) -> Json:
    """The template of a worker pod."""
    cluster = target.config.cluster
    size = resources(cluster.cpus, cluster.memory, cluster.gpus, cluster.gpu_resource)
    ports = [{"name": name, "containerPort": PORTS[name]} for name in (("serve", "metrics") if serves else ("metrics",))]
    pod = _pod(target, component, "ray-worker", size, ports, serves)
    spec = pod["spec"]
    if wanted := [label.split("=", 1) for label in (cluster.gpu_label, cluster.spot_label) if label]:
        spec["nodeSelector"] = {name: value for name, value in wanted}
    tolerations = [{"key": cluster.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}] if cluster.gpus else []
    if cluster.spot_label:
        name, value = cluster.spot_label.split("=", 1)
        tolerations.append({"key": name, "operator": "Equal", "value": value, "effect": "NoSchedule"})
        pod["metadata"].pop("annotations", None)
    if tolerations:
        spec["tolerations"] = tolerations
    return pod


def _pod(target: Target, component: str, name: str, size: Json, ports: list[Json], serves: bool) -> Json:
    mounts, found = volumes(target, keys=serves)
    container: Json = {"name": name, "image": target.image, "env": environment(target), "envFrom": environment_secrets(),
                       "ports": ports, "resources": size, "securityContext": SAFE, "volumeMounts": mounts}
    spec: Json = {"serviceAccountName": f"{APP}-ray", "automountServiceAccountToken": False, "securityContext": dict(POD_USER),
                  "containers": [container], "volumes": found}
    meta: Json = {"labels": labels(component)}
    if serves:
        spec["terminationGracePeriodSeconds"] = round(target.config.serve.drain_seconds) + REMOVE_SECONDS
        if name == "ray-worker":
            container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", _leave(target)]}}}
    else:
        meta["annotations"] = dict(STAY)
    return {"metadata": meta, "spec": spec}


def _leave(target: Target) -> str:
    """Shell: tell Ray that the node leaves, so that Serve moves its replicas, and wait until none is left here.

    `[S]` keeps the search from finding itself.
    """
    seconds = round(target.config.serve.drain_seconds)
    return (f"ray drain-node --reason=DRAIN_NODE_REASON_PREEMPTION --reason-message='the pod ends' "
            f"--deadline-remaining-seconds={seconds}; "
            f"end=$(($(date +%s) + {seconds})); "
            "while [ $(date +%s) -lt $end ] && grep -aqs 'ray::[S]erveReplica' /proc/[0-9]*/cmdline; do sleep 1; done")
