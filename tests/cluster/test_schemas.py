"""Every manifest fits the schemas of Kubernetes and of KubeRay's own resources."""

from __future__ import annotations

import functools
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cluster.shipped import OVERLAYS, PARTS, built, documents
from tests.conftest import SHARED_DATA

CRDS = SHARED_DATA / "kuberay-crds"
FOLDERS = ["base", *(f"overlays/{name}" for name in OVERLAYS)]
OTHERS = {"monitoring.coreos.com/v1"}
"""APIs whose schemas are not to be had here: `test_manifests.py` reads those resources."""


def resources(folder: str) -> list[Any]:
    found = [one for part in PARTS for one in built(f"{folder}/{part}")]
    unlisted = ("raycronjob", "loop") if folder == "base" else ()
    return found + [one for name in unlisted for one in documents(f"base/service/{name}.yaml")]


@pytest.mark.parametrize("version", ["1.29", "1.34"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_kubernetes_takes_them(folder: str, version: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is in the extra `dev`")
    kinds = set()
    for one in resources(folder):
        if one["apiVersion"] not in OTHERS and not one["apiVersion"].startswith("ray.io/"):
            validator.validate(one, version, strict=True)
            kinds.add(one["kind"])
    assert kinds == {"Namespace", "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "PersistentVolumeClaim", "NetworkPolicy",
                     "Service", "Deployment", "StatefulSet", "CronJob", "PodDisruptionBudget"}


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """The schema of version v1 in KubeRay's definition of `kind`."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's definition of {kind} is not in shared/data/kuberay-crds")
    definition = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (found,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    return dict(found["schema"]["openAPIV3Schema"])


def unknown(value: Any, fields: dict[str, Any], path: str = "") -> list[str]:
    """Fields that the schema does not name: Kubernetes would drop them without a word."""
    if isinstance(value, list):
        return [name for one in value for name in unknown(one, fields.get("items", {}), f"{path}[]")]
    if not isinstance(value, dict) or fields.get("x-kubernetes-preserve-unknown-fields"):
        return []
    known, more = fields.get("properties"), fields.get("additionalProperties")
    if known is None:
        return [name for one in value.values() for name in unknown(one, more, path)] if isinstance(more, dict) else []
    return [name for key, one in value.items()
            for name in (unknown(one, known[key], f"{path}.{key}") if key in known else [f"{path}.{key}"])]


@pytest.mark.parametrize("folder", FOLDERS)
def test_kuberay_takes_them(folder: str) -> None:
    """RayJobs, the RayService and the RayCronJob, with their pods."""
    kinds = set()
    for one in resources(folder):
        if one["apiVersion"].startswith("ray.io/"):
            fields = schema(one["kind"])
            jsonschema.Draft202012Validator(fields).validate(one)
            assert unknown(one, fields) == []
            kinds.add(one["kind"])
    assert kinds >= {"RayJob", "RayService"} and ("RayCronJob" in kinds) == (folder == "base")


def test_a_misspelt_field_is_found() -> None:
    """The search itself, on a resource of ours."""
    job = next(one for one in resources("base") if one["kind"] == "RayJob")
    fields = schema("RayJob")
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resource"] = {}
    job["spec"]["backOffLimit"] = 1
    assert sorted(unknown(job, fields)) == [
        ".spec.backOffLimit", ".spec.rayClusterSpec.workerGroupSpecs[].template.spec.containers[].resource"]
