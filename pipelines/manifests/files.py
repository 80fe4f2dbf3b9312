"""Which manifests there are, in which file each stands, and what the file says to its reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hydra_core.errors import InputError
from pipelines.manifests.about import ABOUT, JOB, WRITTEN
from pipelines.manifests.access import access, secrets_script
from pipelines.manifests.jobs import jobs, loop_cron_job, ray_cron_job
from pipelines.manifests.launcher import aws, machines, runtime_env
from pipelines.manifests.monitoring import monitoring
from pipelines.manifests.network import network_policies
from pipelines.manifests.nightly import cron_job
from pipelines.manifests.overlays import OVERLAYS, patches
from pipelines.manifests.servers import mlflow_server, redis_server
from pipelines.manifests.service import disruption_budget, ray_service, serve_config
from pipelines.manifests.storage import storage
from pipelines.manifests.target import Json, Target
from pipelines.manifests.yaml_text import to_documents, to_yaml
from pipelines.runtime.files import write_text

PARTS = ("platform", "jobs", "service")
"""Folders of manifests, in the order in which they are applied."""


def manifests(target: Target) -> dict[str, list[Json]]:
    """Path below `base/` -> its resources."""
    cluster = target.config.cluster
    servers = (mlflow_server(target) if target.has_mlflow else []) + (redis_server(target) if cluster.fault_tolerance else [])
    found = {
        "platform/access.yaml": access(target), "platform/storage.yaml": storage(target),
        "platform/network.yaml": network_policies(target), "platform/servers.yaml": servers,
        "platform/monitoring.yaml": monitoring(target) if cluster.monitoring else [],
        **{f"jobs/{name}.yaml": [job] for name, job in jobs(target).items()},
        "service/endpoint.yaml": [ray_service(target), disruption_budget(target)],
        "service/nightly.yaml": [cron_job(target)] if cluster.nightly == "cronjob" else [],
        "service/raycronjob.yaml": [ray_cron_job(target)] if cluster.nightly != "off" else [],
        "service/loop.yaml": [loop_cron_job(target)]}
    return {path: resources for path, resources in found.items() if resources}


def applied(target: Target, part: str) -> dict[str, list[Json]]:
    """What `kubectl apply -k base/PART` applies: of the two ways to a nightly batch only the chosen one, and
    the loop where it is asked for."""
    cluster = target.config.cluster
    left_out = {"service/raycronjob.yaml": cluster.nightly == "cronjob", "service/loop.yaml": not cluster.loop}
    return {path: resources for path, resources in manifests(target).items()
            if path.startswith(f"{part}/") and not left_out.get(path, False)}


def resources_of(target: Target, part: str) -> list[Json]:
    """The resources of one part, in order."""
    return [resource for resources in applied(target, part).values() for resource in resources]


def part_text(target: Target, name: str) -> str:
    """The YAML of a part, or of one job. Raises InputError for a name that is neither."""
    if name == "secrets":
        return secrets_script(target)
    found = resources_of(target, name) if name in PARTS else manifests(target).get(f"jobs/{name}.yaml")
    if not found:
        names = [*PARTS, "secrets", *(path[5:-5] for path in applied(target, "jobs"))]
        raise InputError(f"cluster {name}: there is no such part: choose from {', '.join(names)}")
    return to_documents(found)


def cluster_files(target: Target) -> dict[str, str]:
    """Every file that `hydra-heads cluster --write FOLDER` writes: path below the folder -> text."""
    found = {f"base/{path}": to_documents(resources, WRITTEN + ABOUT.get(path, JOB))
             for path, resources in manifests(target).items()}
    for part in PARTS:
        names = [path.partition("/")[2] for path in applied(target, part)]
        found[f"base/{part}/kustomization.yaml"] = _kustomization({"resources": names}, "")
    for name, overlay in OVERLAYS.items():
        if overlay.needs_gpus and not target.config.cluster.gpus:
            continue
        variant = overlay.target(target.config)
        if not overlay.alone:
            variant = replace(variant, champion=target.champion)
        for part in PARTS:
            found |= _overlay_files(f"overlays/{name}/{part}", part, overlay.about, target, variant)
    found |= {path: to_yaml(value, WRITTEN + ABOUT[path]) for path, value in {
        "launcher/machines.yaml": machines(target), "launcher/aws.yaml": aws(target), "runtime_env.yaml": runtime_env(),
        "serve_config.yaml": serve_config(target, "127.0.0.1", keys=False)}.items()}
    return found | {"create_secrets.sh": secrets_script(target)}


def _overlay_files(folder: str, part: str, about: str, target: Target, variant: Target) -> dict[str, str]:
    changes, more = patches(resources_of(target, part), resources_of(variant, part))
    values: Json = {"resources": [f"../../../base/{part}", *(["more.yaml"] if more else [])]}
    if changes:
        values["patches"] = changes
    files = {f"{folder}/kustomization.yaml": _kustomization(values, about)}
    return files | ({f"{folder}/more.yaml": to_documents(more, WRITTEN)} if more else {})


def _kustomization(values: Json, about: str) -> str:
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    return to_yaml({**head, **values}, WRITTEN + (f"What differs here from base/: {about}." if about else ""))


def write_files(files: dict[str, str], folder: Path) -> None:
    """Write `files` below `folder`. Others that lie there stay."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / path, text)
        if path.endswith(".sh"):
            (folder / path).chmod(0o755)
