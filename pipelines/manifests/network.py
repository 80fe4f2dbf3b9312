"""NetworkPolicies: who reaches which port. Outgoing traffic is not limited: pods load models from a hub."""

from __future__ import annotations

from typing import Any

from pipelines.manifests.target import APP, DASHBOARD_PORT, METRICS_PORT, SERVE_PORT, Json, Target, labels, resource

RAY_NODES = {"ray.io/is-ray-node": "yes"}
"""KubeRay's own label of head and worker pods."""
CLIENTS = {f"{APP}/client": "true"}
"""The label of a namespace whose pods may ask the endpoint: `kubectl label namespace NAME hydra-heads/client=true`."""
AGENT_PORT = 52365
"""Ray's dashboard agent, which the operator's probes of Serve ask."""


def network_policies(target: Target) -> list[Json]:
    """Pods of the namespace reach each other's Ray; the operator, Prometheus and clients reach what they need."""
    cluster = target.config.cluster
    found = [
        _policy(target, "ray", RAY_NODES, [
            {"from": [{"podSelector": {}}]},
            {"from": [_namespace(cluster.operator_namespace)], "ports": _ports(DASHBOARD_PORT, AGENT_PORT, SERVE_PORT)},
            {"from": [_namespace(cluster.monitoring_namespace)], "ports": _ports(METRICS_PORT)},
            {"from": [{"namespaceSelector": {"matchLabels": CLIENTS}}], "ports": _ports(SERVE_PORT)}])]
    if target.has_mlflow:
        found += [_policy(target, "mlflow", labels("mlflow"), [{"from": [{"podSelector": {}}], "ports": _ports(5000)}]),
                  _policy(target, "postgres", labels("postgres"),
                          [{"from": [{"podSelector": {"matchLabels": labels("mlflow")}}], "ports": _ports(5432)}])]
    if cluster.fault_tolerance:  # from the whole namespace: a job of the operator empties the store of a cluster that is gone
        found.append(_policy(target, "redis", labels("redis"), [{"from": [{"podSelector": {}}], "ports": _ports(6379)}]))
    return found


def _policy(target: Target, name: str, pods: dict[str, str], rules: list[Any]) -> Json:
    return resource(target, "networking.k8s.io/v1", "NetworkPolicy", f"{APP}-{name}", "network",
                    spec={"podSelector": {"matchLabels": pods}, "policyTypes": ["Ingress"], "ingress": rules})


def _namespace(name: str) -> Json:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _ports(*numbers: int) -> list[Json]:
    return [{"port": number, "protocol": "TCP"} for number in numbers]
