"""The endpoint: Serve's own configuration, the RayService that carries it, and its disruption budget."""

from __future__ import annotations

from dataclasses import asdict

from pipelines.manifests.ray_cluster import ray_cluster
from pipelines.manifests.target import APP, KEYS_FILE, KEYS_FOLDER, SERVE_PORT, Json, Target, labels, resource
from pipelines.manifests.yaml_text import to_yaml
from pipelines.runtime.artifacts import served_folder
from pipelines.runtime.provenance import redacted

DELETED_SECONDS = 300
"""After an upgrade to a new Ray cluster, the old one goes on so long with what it answers."""


def serve_config(target: Target, host: str, keys: bool) -> Json:
    """What `serve deploy` reads. `host`: where the proxies listen; `keys`: ask for the API keys of the mounted secret.

    `args` hold nothing of the heads, which are the `user_config` of the replicas: Serve then changes heads without replacing
    a replica, and the operator, which compares this text, does not undo it.
    """
    serve, base = target.config.serve, target.config.base
    args: Json = {
        "base": base.model_dump(mode="json"), "cache": target.cache,
        "configuration": None, "label": "plain", "app_name": serve.app_name,
        "max_batch_size": serve.max_batch_size, "max_queued": serve.max_queued, "max_new_tokens": serve.max_new_tokens,
        "max_prompt_tokens": serve.max_prompt_tokens, "max_body_bytes": serve.max_body_bytes,
        "drain_seconds": serve.drain_seconds, "hung_seconds": serve.hung_seconds, "request_seconds": serve.request_seconds,
        "shared_answers": serve.shared_answers, "prefix_cache_tokens": serve.prefix_cache_tokens,
        "replicas": serve.replicas, "max_replicas": serve.max_replicas, "cpus": serve.workers.cpus, "gpus": serve.workers.gpus,
        "threads": serve.workers.threads, "cors_origins": list(serve.cors_origins)}
    args |= _followed(target)
    if keys:
        args |= {"api_keys_file": f"{KEYS_FOLDER}/{KEYS_FILE}", "require_keys": True}
    return {
        "proxy_location": "EveryNode",  # with HeadOnly the operator's probe finds no proxy on a worker, which stays unready
        "http_options": {"host": host, "port": SERVE_PORT},
        "applications": [{"name": serve.app_name, "route_prefix": "/", "import_path": "pipelines.serve:build_app", "args": args,
                          "deployments": [{"name": "DecodeServer", "user_config": asdict(target.heads)}]}]}


def _followed(target: Target) -> Json:
    """What the endpoint follows and records, where it is asked for. The address of MLflow is in the pods' environment, unless the
    settings have one."""
    config, found = target.config, Json()
    if config.serve.follows:
        found["follow"] = {"model": config.serve.model, "seconds": config.serve.follow_seconds, "storage": config.storage,
                           "tracking": redacted(config.tracking.model_dump(mode="json")),
                           "promote": {name: getattr(config.promote, name) for name in ("model_name", "alias")}}
    if config.serve.webhook_secret_file is not None:
        found["webhook_secret_file"] = config.serve.webhook_secret_file
    if config.serve.record.share:
        found["record"] = config.serve.record.model_dump(mode="json") | {"folder": served_folder(config)}
    return found


def ray_service(target: Target) -> Json:
    """The endpoint. It asks for keys: others in the cluster reach it."""
    return resource(target, "ray.io/v1", "RayService", APP, "endpoint", spec={
        "serveConfigV2": to_yaml(serve_config(target, "0.0.0.0", keys=True)),
        "rayClusterDeletionDelaySeconds": DELETED_SECONDS,
        "rayClusterConfig": ray_cluster(target, "endpoint", target.config.cluster.nodes, serves=True)})


def disruption_budget(target: Target) -> Json:
    """Of the head and the workers at most one pod is evicted at a time. For pods of a custom resource Kubernetes takes a least
    number alone."""
    return resource(target, "policy/v1", "PodDisruptionBudget", f"{APP}-endpoint", "endpoint",
                    spec={"minAvailable": target.config.cluster.least_nodes, "selector": {"matchLabels": labels("endpoint")}})
