"""Servers beside Ray: MLflow with PostgreSQL, and the Redis that keeps the state of the endpoint's head."""

from __future__ import annotations

from typing import Any

from pipelines.manifests.pods import POD_USER, SAFE, environment_secrets, resources
from pipelines.manifests.ray_cluster import REDIS_SECRET
from pipelines.manifests.target import APP, Json, Target, labels, resource

POSTGRES_IMAGE, REDIS_IMAGE = "postgres:17.6", "redis:7.4.5"
POSTGRES_USER, REDIS_USER = 999, 999
"""The users of those images."""
ARTIFACTS = "mlflow"
"""Folder of the artifacts on the shared volume."""


def mlflow_server(target: Target) -> list[Json]:
    """The tracking server. It knows its own name in the cluster: MLflow refuses requests that come under another one."""
    cluster, name = target.config.cluster, f"{APP}-mlflow"
    hosts = [name, f"{name}.{target.namespace}", f"{name}.{target.namespace}.svc", "localhost"]
    artifacts = cluster.artifacts or (f"{cluster.mount.rstrip('/')}/{ARTIFACTS}" if target.has_volume
                                      else f"{target.config.storage}/{ARTIFACTS}")
    container: Json = {
        "name": "mlflow", "image": target.image,
        "command": ["mlflow", "server", "--host=0.0.0.0", "--port=5000", "--workers=2",
                    f"--allowed-hosts={','.join([*hosts, *(f'{host}:5000' for host in hosts)])}",
                    f"--artifacts-destination={artifacts}"],
        "env": [{"name": "POSTGRES_PASSWORD", "valueFrom": {"secretKeyRef": {"name": f"{APP}-postgres", "key": "password"}}},
                {"name": "MLFLOW_BACKEND_STORE_URI",
                 "value": f"postgresql+psycopg2://mlflow:$(POSTGRES_PASSWORD)@{APP}-postgres:5432/mlflow"},
                {"name": "MLFLOW_DISABLE_TELEMETRY", "value": "true"},
                {"name": "MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "value": "false"}],  # processes for evaluations of agents
        "envFrom": environment_secrets()[:1], "ports": [{"name": "http", "containerPort": 5000}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10},
        "resources": resources(1, "4Gi"), "securityContext": SAFE}
    spec: Json = {"serviceAccountName": f"{APP}-ray", "automountServiceAccountToken": False, "securityContext": dict(POD_USER),
                  "containers": [container]}
    if target.has_volume:
        container["volumeMounts"] = [{"name": "shared", "mountPath": cluster.mount}]
        spec["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": cluster.claim}}]
    deployment = resource(target, "apps/v1", "Deployment", name, "mlflow", spec={
        "replicas": 1, "selector": {"matchLabels": labels("mlflow")},
        "template": {"metadata": {"labels": labels("mlflow")}, "spec": spec}})
    password = {"valueFrom": {"secretKeyRef": {"name": f"{APP}-postgres", "key": "password"}}}
    environment = [{"name": "POSTGRES_USER", "value": "mlflow"}, {"name": "POSTGRES_DB", "value": "mlflow"},
                   {"name": "POSTGRES_PASSWORD", **password}, {"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"}]
    database = _stateful(target, "postgres", POSTGRES_IMAGE, POSTGRES_USER, 5432, "/var/lib/postgresql/data", "20Gi",
                         {"env": environment, "readinessProbe": {"exec": {"command": ["pg_isready", "-U", "mlflow"]}},
                          "resources": resources(1, "2Gi")})
    return [_service(target, "mlflow", 5000), deployment, _service(target, "postgres", 5432), database]


def redis_server(target: Target) -> list[Json]:
    """Where the endpoint's head keeps what it has to know after a restart."""
    variable = {"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}}
    return [_service(target, "redis", 6379),
            _stateful(target, "redis", REDIS_IMAGE, REDIS_USER, 6379, "/data", "5Gi",
                      {"command": ["redis-server", "--appendonly", "yes", "--requirepass", "$(REDIS_PASSWORD)"],
                       "env": [variable], "readinessProbe": {"tcpSocket": {"port": 6379}}, "resources": resources(0.5, "1Gi")})]


def _service(target: Target, name: str, port: int) -> Json:
    return resource(target, "v1", "Service", f"{APP}-{name}", name,
                    spec={"selector": labels(name), "ports": [{"name": name, "port": port, "targetPort": port}]})


def _stateful(target: Target, name: str, image: str, user: int, port: int, folder: str, size: str,
              container: dict[str, Any]) -> Json:
    """One pod with a disk of its own."""
    pod = {"metadata": {"labels": labels(name)}, "spec": {
        "automountServiceAccountToken": False,
        "securityContext": POD_USER | {"runAsUser": user, "runAsGroup": user, "fsGroup": user},
        "containers": [{"name": name, "image": image, "ports": [{"name": name, "containerPort": port}], "securityContext": SAFE,
                        "volumeMounts": [{"name": "data", "mountPath": folder}], **container}]}}
    return resource(target, "apps/v1", "StatefulSet", f"{APP}-{name}", name, spec={
        "serviceName": f"{APP}-{name}", "replicas": 1, "selector": {"matchLabels": labels(name)}, "template": pod,
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}}}]})
