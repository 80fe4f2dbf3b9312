"""Who may do what: the namespace, the pods' account, a role for people, and the secrets by name."""

from __future__ import annotations

from pipelines.manifests.ray_cluster import REDIS_SECRET, TOKEN_SECRET
from pipelines.manifests.target import APP, KEYS_FILE, Json, Target, labels, resource

RBAC = "rbac.authorization.k8s.io"
SUBMITTERS = f"{APP}-submitters"
"""The role of people, or of a CI account, that start jobs, and the group that has it."""


def access(target: Target) -> list[Json]:
    """Namespace, the account of the pods, which has no rights of its own, and the role of who submits."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {
        "name": target.namespace, "labels": labels("access") | {"pod-security.kubernetes.io/enforce": "baseline",
                                                               "pod-security.kubernetes.io/warn": "restricted"}}}
    account = resource(target, "v1", "ServiceAccount", f"{APP}-ray", "access", automountServiceAccountToken=False)
    if target.config.cluster.image_pull:
        account["imagePullSecrets"] = [{"name": target.config.cluster.image_pull}]
    role = resource(target, f"{RBAC}/v1", "Role", SUBMITTERS, "access", rules=[
        {"apiGroups": ["ray.io"], "resources": ["rayjobs", "rayservices", "raycronjobs"],
         "verbs": ["get", "list", "watch", "create", "update", "patch", "delete"]},
        {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": ["batch"], "resources": ["jobs", "cronjobs"], "verbs": ["get", "list", "watch", "create", "delete"]},
        {"apiGroups": [""], "resources": ["pods", "pods/log", "events", "services"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["create"]}])
    binding = resource(target, f"{RBAC}/v1", "RoleBinding", SUBMITTERS, "access",
                       roleRef={"apiGroup": RBAC, "kind": "Role", "name": SUBMITTERS},
                       subjects=[{"apiGroup": RBAC, "kind": "Group", "name": SUBMITTERS}])
    return [namespace, account, role, binding]


def secrets_script(target: Target) -> str:
    """A shell script that creates the secrets, by name: it holds no value. What is given by nobody is drawn."""
    cluster, create = target.config.cluster, f"kubectl --namespace {target.namespace} create secret generic"
    draw = "$(openssl rand -hex 24)"
    lines = [
        "#!/bin/sh",
        "# Creates the secrets that the manifests name. Run it once, with those of the variables set that are needed:",
        "#   API_KEYS_FILE (one key a line, 16 characters or more; who may ask the endpoint) and BATCH_KEY (one of them);",
        "#   HF_TOKEN for a gated base; AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and perhaps AWS_ENDPOINT_URL for S3;",
        "#   MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for an MLflow server of your own that asks for them.",
        "set -eu",
        f'{create} {APP}-keys --from-file={KEYS_FILE}="$API_KEYS_FILE" --from-literal=batch="$BATCH_KEY"']
    if cluster.token_auth:
        lines.append(f'{create} {TOKEN_SECRET} --from-literal=auth_token="{draw}"')
    if cluster.fault_tolerance:
        lines.append(f'{create} {REDIS_SECRET} --from-literal=password="{draw}"')
    if target.has_mlflow:
        lines.append(f'{create} {APP}-postgres --from-literal=password="{draw}"')
    lines += [
        f'[ -z "${{HF_TOKEN:-}}" ] || {create} hf-token --from-literal=token="$HF_TOKEN"',
        f'[ -z "${{AWS_ACCESS_KEY_ID:-}}" ] || {create} {APP}-s3 --from-literal=AWS_ACCESS_KEY_ID="$AWS_ACCESS_KEY_ID" '
        '--from-literal=AWS_SECRET_ACCESS_KEY="$AWS_SECRET_ACCESS_KEY" '
        '${AWS_ENDPOINT_URL:+--from-literal=AWS_ENDPOINT_URL="$AWS_ENDPOINT_URL"}',
        f'[ -z "${{MLFLOW_TRACKING_USERNAME:-}}" ] || {create} {APP}-mlflow '
        '--from-literal=MLFLOW_TRACKING_USERNAME="$MLFLOW_TRACKING_USERNAME" '
        '--from-literal=MLFLOW_TRACKING_PASSWORD="$MLFLOW_TRACKING_PASSWORD"']
    return "\n".join(lines) + "\n"
