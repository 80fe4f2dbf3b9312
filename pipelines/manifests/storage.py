"""What pods read: the shared volume and the settings of the run."""

from __future__ import annotations

from pipelines.manifests.target import APP, CONFIG_FILE, Json, Target, resource


def storage(target: Target) -> list[Json]:
    """The settings as a ConfigMap, and the claim of the volume unless there is one already."""
    cluster = target.config.cluster
    found = [resource(target, "v1", "ConfigMap", f"{APP}-run", "storage", data={CONFIG_FILE: target.run_yaml()})]
    if target.has_volume and cluster.claim_size is not None:
        spec: Json = {"accessModes": [cluster.access_mode], "resources": {"requests": {"storage": cluster.claim_size}}}
        if cluster.storage_class:
            spec["storageClassName"] = cluster.storage_class
        found.append(resource(target, "v1", "PersistentVolumeClaim", cluster.claim, "storage", spec=spec))
    return found
