"""Every setting of `cluster` changes what is written, at its own place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import yaml

from pipelines.config import ClusterSection, load_config
from pipelines.manifests import Target
from pipelines.manifests.files import PARTS, manifests, resources_of
from pipelines.manifests.launcher import aws, machines
from pipelines.serve.following import Follow
from pipelines.serve.messages import AppArgs
from pipelines.serve.recorder import Recording
from tests.cluster.shipped import of_kind, values_of

BASE = {"storage": "/mnt/shared/h", "cluster.gpus": 2, "cluster.cpus": 16}


def made(**changes: Any) -> list[Any]:
    """All resources that these settings of `cluster` give, those that wait to be listed too."""
    values = BASE | {name if "." in name or name == "storage" else f"cluster.{name}": value for name, value in changes.items()}
    target = Target(load_config(None, values)).check()
    return [one for group in manifests(target).values() for one in group]


def workers(resources: list[Any], kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in of_kind(resources, kind) if one["metadata"]["name"] == name]
    (group,) = values_of(found, "workerGroupSpecs")[0]
    return dict(group)


def ours(resources: list[Any]) -> set[str]:
    return {image for image in values_of(resources, "image") if not image.startswith(("postgres:", "redis:"))}


def names(resources: list[Any], kind: str) -> set[str]:
    return {one["metadata"]["name"] for one in of_kind(resources, kind)}


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return dict(group["template"]["spec"])


def worker(found: list[Any]) -> dict[str, Any]:
    return pod(workers(found, "RayJob", "hydra-heads-train"))


def head(found: list[Any]) -> dict[str, Any]:
    return pod(values_of(found, "headGroupSpec")[0])


def service(found: list[Any]) -> dict[str, Any]:
    return workers(found, "RayService", "hydra-heads")


CASES: dict[str, tuple[dict[str, Any], Callable[[list[Any]], object], object, object]] = {
    "namespace": ({"namespace": "ours"}, lambda found: {
        one["metadata"].get("namespace", one["metadata"]["name"]) for one in found}, {"hydra-heads"}, {"ours"}),
    "image": ({"image": "registry.local/x:1"}, lambda found: ours(found) == {"registry.local/x:1"}, False, True),
    "image_pull": ({"image_pull": "pull"}, lambda found: of_kind(found, "ServiceAccount")[0].get("imagePullSecrets"),
                   None, [{"name": "pull"}]),
    "nodes": ({"nodes": 3}, lambda found: [
        workers(found, "RayJob", f"hydra-heads-{name}")["replicas"] for name in ("train", "tree")], [1, 1], [3, 1]),
    "min_nodes": ({"nodes": 3, "min_nodes": 2}, lambda found: service(found)["minReplicas"], 1, 2),
    "max_nodes": ({"max_nodes": 5}, lambda found: [service(found)["maxReplicas"], *values_of(found, "enableInTreeAutoscaling")],
                  [1], [5, True]),
    "cpus": ({"cpus": 24}, lambda found: worker(found)["containers"][0]["resources"]["limits"]["cpu"], "16", "24"),
    "memory": ({"memory": "99Gi"}, lambda found: worker(found)["containers"][0]["resources"]["requests"]["memory"],
               "16Gi", "99Gi"),
    "gpus": ({"gpus": 4}, lambda found: worker(found)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "2", "4"),
    "gpu_resource": ({"gpu_resource": "amd.com/gpu"}, lambda found: [
        worker(found)["tolerations"][0]["key"], "amd.com/gpu" in worker(found)["containers"][0]["resources"]["limits"]],
        ["nvidia.com/gpu", False], ["amd.com/gpu", True]),
    "gpu_label": ({"gpu_label": "a.b/c=d"}, lambda found: worker(found).get("nodeSelector"), None, {"a.b/c": "d"}),
    "spot_label": ({"spot_label": "s=t"}, lambda found: [
        worker(found).get("nodeSelector"), worker(found)["tolerations"][1:], "annotations" in workers(
            found, "RayJob", "hydra-heads-train")["template"]["metadata"]], [None, [], True],
        [{"s": "t"}, [{"key": "s", "operator": "Equal", "value": "t", "effect": "NoSchedule"}], False]),
    "head_cpus": ({"head_cpus": 7}, lambda found: head(found)["containers"][0]["resources"]["limits"]["cpu"], "2", "7"),
    "head_memory": ({"head_memory": "7Gi"}, lambda found: head(found)["containers"][0]["resources"]["limits"]["memory"],
                    "8Gi", "7Gi"),
    "mount": ({"mount": "/data", "storage": "/data/h"}, lambda found: {
        one["mountPath"] for mounts in values_of(found, "volumeMounts") for one in mounts if one["name"] == "shared"},
        {"/mnt/shared"}, {"/data"}),
    "claim": ({"claim": "theirs"}, lambda found: {*values_of(found, "claimName"), *names(found, "PersistentVolumeClaim")},
              {"hydra-heads"}, {"theirs"}),
    "claim_size": ({"claim_size": None}, lambda found: len(of_kind(found, "PersistentVolumeClaim")), 1, 0),
    "access_mode": ({"access_mode": "ReadWriteOnce"}, lambda found: of_kind(found, "PersistentVolumeClaim")[0]["spec"][
        "accessModes"], ["ReadWriteMany"], ["ReadWriteOnce"]),
    "storage_class": ({"storage_class": "nfs"}, lambda found: values_of(found, "storageClassName"), [], ["nfs"]),
    "mlflow": ({"mlflow": False}, lambda found: [len(of_kind(found, "Deployment")), "MLFLOW_TRACKING_URI" in str(found)],
               [1, True], [0, False]),
    "artifacts": ({"artifacts": "s3://bucket/x"}, lambda found: of_kind(found, "Deployment")[0]["spec"]["template"]["spec"][
        "containers"][0]["command"][-1], "--artifacts-destination=/mnt/shared/mlflow", "--artifacts-destination=s3://bucket/x"),
    "fault_tolerance": ({"fault_tolerance": False}, lambda found: [len(values_of(found, "gcsFaultToleranceOptions")),
                                                                   "hydra-heads-redis" in names(found, "StatefulSet")],
                        [1, True], [0, False]),
    "token_auth": ({"token_auth": False}, lambda found: len(values_of(found, "authOptions")) > 0, True, False),
    "queue": ({"queue": "line"}, lambda found: {one["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
                                                for one in of_kind(found, "RayJob")}, {None}, {"line"}),
    "schedule": ({"schedule": "5 1 * * *"}, lambda found: values_of(found, "schedule"), ["0 2 * * *"] * 2 + ["0 4 * * 0"],
                 ["5 1 * * *"] * 2 + ["0 4 * * 0"]),
    "nightly": ({"nightly": "off"}, lambda found: len(of_kind(found, "CronJob")) + len(of_kind(found, "RayCronJob")), 3, 1),
    "loop_schedule": ({"loop_schedule": "5 5 1 * *"}, lambda found: values_of(found, "schedule")[-1], "0 4 * * 0", "5 5 1 * *"),
    "batch_input": ({"batch_input": "in/{partition}"}, lambda found: "batch.input=/mnt/shared/in/{partition}" in of_kind(
        found, "CronJob")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"], False, True),
    "batch_output": ({"batch_output": "out/{partition}"}, lambda found: "batch.output=/mnt/shared/out/{partition}" in values_of(
        of_kind(found, "RayCronJob"), "entrypoint")[0], False, True),
    "monitoring": ({"monitoring": False}, lambda found: len(of_kind(found, "PrometheusRule")), 1, 0),
    "monitoring_label": ({"monitoring_label": "team=x"}, lambda found: of_kind(found, "PodMonitor")[0]["metadata"][
        "labels"].get("team"), None, "x"),
    "monitoring_namespace": ({"monitoring_namespace": "prom"}, lambda found: "'prom'" in str(of_kind(found, "NetworkPolicy")),
                             False, True),
    "operator_namespace": ({"operator_namespace": "ops"}, lambda found: "'ops'" in str(of_kind(found, "NetworkPolicy")),
                           False, True),
}


@pytest.mark.parametrize("setting", [name for name in ClusterSection.model_fields if name != "loop"])
def test_a_setting_takes_effect(setting: str) -> None:
    changes, look, before, after = CASES[setting]
    assert setting in changes
    assert (look(made()), look(made(**changes))) == (before, after)


def test_an_image_for_gpus_is_another_one() -> None:
    def names_of(found: list[Any]) -> set[str]:
        return {image.partition(":")[0] for image in ours(found)}

    assert names_of(made()) == {"hydra-heads-cuda"} and names_of(made(gpus=0)) == {"hydra-heads"}


def test_a_store_needs_no_volume() -> None:
    """Where the storage is a URI, pods have its credentials and no shared volume."""
    config = load_config(None, BASE | {"storage": "s3://bucket/h"})
    target = Target(config).check()
    found = [one for part in PARTS for one in resources_of(target, part)]
    assert not of_kind(found, "PersistentVolumeClaim") and not values_of(found, "persistentVolumeClaim")
    assert "HF_HOME" not in str(found) and "hydra-heads-s3" in str(of_kind(found, "RayJob"))
    assert "--artifacts-destination=s3://bucket/h/mlflow" in str(of_kind(found, "Deployment"))
    assert "batch.input=s3://bucket/h/prompts/{partition}.jsonl" in str(of_kind(found, "CronJob"))
    assert "cache: /home/hydra/.hydra-heads/cache" in str(of_kind(found, "RayService"))
    (settings,) = of_kind(found, "ConfigMap")
    assert "storage: s3://bucket/h" in settings["data"]["run.yaml"]


def test_an_mlflow_server_of_one_s_own_is_used_and_its_password_is_written_nowhere() -> None:
    found = made(**{"tracking.uri": "http://me:hunter2@mlflow.local"})
    assert not of_kind(found, "Deployment") and "hunter2" not in str(found)
    assert "uri: http://mlflow.local" in of_kind(found, "ConfigMap")[0]["data"]["run.yaml"]


def test_the_nightly_batch_is_one_of_two() -> None:
    """Both would answer the same day twice."""
    for chosen, kinds in (("cronjob", {"CronJob"}), ("raycronjob", {"RayCronJob"}), ("off", set())):
        target = Target(load_config(None, BASE | {"cluster.nightly": chosen}))
        assert {one["kind"] for one in resources_of(target, "service")} - {"RayService", "PodDisruptionBudget"} == kinds


def test_the_loop_is_listed_where_it_is_asked_for() -> None:
    for asked in (False, True):
        target = Target(load_config(None, BASE | {"cluster.loop": asked, "cluster.nightly": "off"}))
        assert ("RayCronJob" in {one["kind"] for one in resources_of(target, "service")}) == asked


def test_an_endpoint_that_follows_and_records() -> None:
    found = made(**{"serve.model": "models:/mine@champion", "serve.record.share": 0.01, "serve.webhook_secret_file": "/s/hook",
                    "tracking.uri": "http://me:hunter2@mlflow.local"})
    (service,) = of_kind(found, "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    args = application["args"]
    assert (args["follow"]["model"], args["follow"]["seconds"], args["webhook_secret_file"]) == (
        "models:/mine@champion", 30, "/s/hook")
    assert args["record"]["folder"] == "/mnt/shared/h/served/hydra-heads" and "hunter2" not in str(found)
    assert application["deployments"][0]["user_config"]["configuration"] is None  # until the first look
    Follow(**args["follow"]), Recording(**args["record"])
    plain = yaml.safe_load(of_kind(made(), "RayService")[0]["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert not {"follow", "record", "webhook_secret_file"} & set(plain)


def test_the_endpoint_has_every_setting_that_a_command_would_start_it_with() -> None:
    """A field of `AppArgs` that the manifest does not name would be left at its default there."""
    found = made(**{"serve.shared_answers": 77, "serve.prefix_cache_tokens": 320, "serve.request_seconds": 9.0})
    (resource,) = of_kind(found, "RayService")
    args = yaml.safe_load(resource["spec"]["serveConfigV2"])["applications"][0]["args"]
    elsewhere = {"version", "digest",  # of the heads: `user_config`
                 "api_key_digests",  # of the file of `api_keys_file`
                 "owner",  # none: the application outlives every command
                 "follow", "webhook_secret", "record",  # where they are asked for
                 "vllm"}  # refused in manifests
    assert {one.name for one in fields(AppArgs)} - args.keys() == elsewhere
    assert (args["shared_answers"], args["prefix_cache_tokens"], args["request_seconds"]) == (77, 320, 9.0)


def test_jobs_that_have_something_to_do() -> None:
    assert "hydra-heads-ablate" not in names(made(), "RayJob")
    variants = {"a": {"heads": {"kind": "medusa"}}}
    assert "hydra-heads-ablate" in names(made(**{"ablate.variants": variants}), "RayJob")


def test_the_launchers_have_as_many_machines() -> None:
    target = Target(load_config(None, BASE | {"cluster.nodes": 3, "cluster.max_nodes": 5, "cluster.spot_label": "a=b"}))
    assert len(machines(target)["provider"]["worker_ips"]) == machines(target)["max_workers"] == 3
    node = aws(target)["available_node_types"]["worker"]
    assert (node["min_workers"], node["max_workers"]) == (3, 5)
    assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
