"""The part that RayJob, RayCronJob and RayService have in common: one Ray cluster."""

from __future__ import annotations

from importlib import metadata

from pipelines.manifests.pods import SAFE, head_pod, worker_pod
from pipelines.manifests.target import APP, Json, Target

TOKEN_SECRET = f"{APP}-ray-token"
REDIS_SECRET = f"{APP}-redis"


def ray_cluster(target: Target, component: str, nodes: int, serves: bool = False) -> Json:
    """A cluster of one head, which runs no actor, and `nodes` workers; that of the endpoint may scale."""
    cluster = target.config.cluster
    spec: Json = {"rayVersion": metadata.version("ray")}
    if cluster.token_auth:
        spec["authOptions"] = {"mode": "token", "secretName": TOKEN_SECRET}
    if serves and cluster.fault_tolerance:
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": f"{APP}-redis:6379",
            "redisPassword": {"valueFrom": {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}}}
    if serves and cluster.scales:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": 300, "securityContext": SAFE,
                                     "resources": {"requests": {"cpu": "500m", "memory": "512Mi"},
                                                   "limits": {"cpu": "500m", "memory": "512Mi"}}}
    spec["headGroupSpec"] = {"rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
                             "template": head_pod(target, component, serves)}
    least, most = (cluster.least_nodes, cluster.most_nodes) if serves else (nodes, nodes)
    spec["workerGroupSpecs"] = [{
        "groupName": "gpu" if cluster.gpus else "cpu", "replicas": least, "minReplicas": least, "maxReplicas": most,
        "rayStartParams": {}, "template": worker_pod(target, component, serves)}] if most else []
    return spec
