"""The shipped manifests are what the command writes, and what they name exists."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from subprocess import list2cmdline
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import DEFAULT_DASHBOARD_PORT, DEFAULT_PORT
from ray.serve.schema import ServeDeploySchema

from jobs.runner import read_config
from pipelines.config import RunConfig
from pipelines.manifests import Target, cluster_files
from pipelines.manifests.files import resources_of
from pipelines.manifests.overlays import OVERLAYS as DEFINED
from pipelines.serve.messages import AppArgs
from pipelines.serve.metrics import series
from pipelines.serve.served_app import REMOVED_SECONDS
from pipelines.serve.stage import ROUTE, find_args
from pipelines.serve.user_config import Heads
from tests.cluster.shipped import CLUSTER, OVERLAYS, PARTS, built, configure, documents, load, of_kind, values_of, variants
from tests.conftest import ROOT

BY_HAND = {"README.md", "Dockerfile", "Dockerfile.cuda", "constraints.txt", "grafana_dashboard.json"}
SHIPPED_FROM = ROOT / "jobs" / "configs" / "cluster_llama_8b.yaml"
PLATFORM_METRICS = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes",
                    "kube_cronjob_status_last_successful_time", "kube_pod_container_status_restarts_total"}
"""Series of the kubelet and of kube-state-metrics."""


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(read_config("cluster", str(SHIPPED_FROM), []))


def run_yaml(folder: str) -> str:
    (settings,) = of_kind(built(f"{folder}/platform"), "ConfigMap")
    return str(settings["data"]["run.yaml"])


def test_shipped_files_are_what_the_command_writes(target: Target) -> None:
    """After a change: `hydra-heads cluster --config jobs/configs/cluster_llama_8b.yaml --write cluster`."""
    written = cluster_files(target)
    for path, text in written.items():
        assert (CLUSTER / path).read_text(encoding="utf-8") == text, path
    there = {path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*") if path.is_file()}
    assert there == {*written, *BY_HAND, "SIZES.md"}  # which `hydra-heads config --sizes` writes


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CLUSTER)))
def test_parses(path: Path) -> None:
    """As documents, each a mapping; lines that a person can read."""
    assert all(isinstance(one, dict) for one in documents(path))
    assert path.read_text(encoding="utf-8").startswith("# Written by `hydra-heads cluster`")


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_what_its_settings_give(target: Target, name: str) -> None:
    """Base and patches together are the manifests of the overlay's own settings."""
    variant = DEFINED[name].target(target.config)
    for part in PARTS:
        assert built(f"overlays/{name}/{part}") == resources_of(variant, part)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, whose kustomize builds these folders")
@pytest.mark.parametrize("name", OVERLAYS)
def test_kustomize_builds_the_same(name: str) -> None:
    """Kustomize itself, which needs no cluster, gives what the small reader of these tests gives."""
    def key(one: Any) -> tuple[str, str]:
        return one["kind"], one["metadata"]["name"]

    def texts_end(value: Any) -> Any:
        """kustomize takes the line break from the end of a patch, and so from a text in its last line."""
        if isinstance(value, dict):
            return {name: texts_end(one) for name, one in value.items()}
        return [texts_end(one) for one in value] if isinstance(value, list) else (
            value.rstrip("\n") if isinstance(value, str) else value)

    for part in PARTS:
        done = subprocess.run(["kubectl", "kustomize", str(CLUSTER / "overlays" / name / part)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (texts_end(sorted(yaml.safe_load_all(done.stdout), key=key))
                == texts_end(sorted(built(f"overlays/{name}/{part}"), key=key)))


def check_serve(values: dict[str, Any]) -> None:
    """Serve's own schema, our arguments, and heads that a replica reads."""
    ServeDeploySchema.model_validate(values)
    for application in values["applications"]:
        module, name = application["import_path"].split(":")
        assert callable(getattr(importlib.import_module(module), name))
        given = {name: value for name, value in application["args"].items() if name != "api_keys_file"}
        AppArgs(**given)
        (deployment,) = application["deployments"]
        assert deployment["name"] == "DecodeServer" and Heads.of(deployment["user_config"])
        assert set(deployment) == {"name", "user_config"}  # anything else would take the place of what build_app sets


def test_serve_config(target: Target) -> None:
    """`serve deploy` gets the arguments that `hydra-heads serve` would start with."""
    values = load("serve_config.yaml")
    check_serve(values)
    config = target.config.model_copy(update={"serve": target.config.serve.model_copy(update={"model": "plain"})})
    (application,) = values["applications"]
    given = AppArgs(**(application["args"] | {"cors_origins": tuple(application["args"]["cors_origins"])}))
    assert given == find_args(config)
    heads = application["deployments"][0]["user_config"]
    assert heads["configuration"] == "/mnt/shared/hydra-heads/runs/llama-8b/promote/configuration"  # where `promote` writes


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_rayservice(folder: str) -> None:
    """A configuration that Serve takes, a proxy on every node, keys, time to drain, and a budget for its pods."""
    resources = built(f"{folder}/service")
    (service,) = of_kind(resources, "RayService")
    inner = yaml.safe_load(service["spec"]["serveConfigV2"])
    check_serve(inner)
    assert inner["proxy_location"] == "EveryNode"
    (application,) = inner["applications"]
    keys = Path(application["args"]["api_keys_file"])
    assert application["args"]["require_keys"] is True and inner["http_options"]["host"] == "0.0.0.0"
    cluster = service["spec"]["rayClusterConfig"]
    check_cluster(cluster)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        mounted = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == mounted[str(keys.parent)]]
        assert volume["secret"]["secretName"] and volume["secret"]["defaultMode"] == 0o400  # a file of keys is nobody else's
        assert spec["terminationGracePeriodSeconds"] >= application["args"]["drain_seconds"] + REMOVED_SECONDS
    (worker,) = cluster["workerGroupSpecs"]
    assert "ray drain-node" in worker["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    (budget,) = of_kind(resources, "PodDisruptionBudget")
    wanted = budget["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= worker["template"]["metadata"]["labels"].items()
    assert budget["spec"]["minAvailable"] == worker["minReplicas"]  # of one pod more, the head


def test_the_preparation_to_leave_is_a_shell_that_ends(tmp_path: Path) -> None:
    """With `ray` in place of the real one, and a table of processes of its own: without a replica, and with one that ends."""
    (service,) = of_kind(built("base/service"), "RayService")
    container = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    (tmp_path / "ray").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\" > asked\n", encoding="utf-8")
    (tmp_path / "ray").chmod(0o755)
    command = [word.replace("/proc/", f"{tmp_path}/proc/") for word in command]
    running = tmp_path / "proc" / "7" / "cmdline"
    running.parent.mkdir(parents=True)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, env=environment)
    running.write_bytes(b"ray::ServeReplica:hydra-heads:DecodeServer\0")
    waits = subprocess.Popen(command, cwd=tmp_path, env=environment)
    with pytest.raises(subprocess.TimeoutExpired):
        waits.wait(2)
    running.unlink()
    assert waits.wait(60) == 0
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    from ray.scripts.scripts import drain_node

    assert asked[0] == "drain-node"
    values = drain_node.make_context("drain-node", asked[1:]).params
    assert values["deadline_remaining_seconds"] == 120 and values["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert values["node_id"] is None  # the node that asks


def check_cluster(spec: dict[str, Any]) -> None:
    """Images, bounds of the groups, and a head that runs no actor."""
    assert spec["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"] == {"mode": "token", "secretName": "hydra-heads-ray-token"}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_ray_jobs(folder: str, tmp_path: Path) -> None:
    """Every entry point is a command that our own parser takes, also after KubeRay's shell and Ray have passed it on."""
    jobs = of_kind(built(f"{folder}/jobs"), "RayJob")
    assert {job["metadata"]["labels"]["app.kubernetes.io/component"] for job in jobs} == {
        "chain", "distill", "train", "tree", "bench", "promote", "batch", "load", "loop"}
    for job in jobs:
        spec, name = job["spec"], job["metadata"]["labels"]["app.kubernetes.io/component"]
        check_cluster(spec["rayClusterSpec"])
        assert spec["shutdownAfterJobFinishes"] is True and len(job["metadata"]["name"]) <= 47
        assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"]), dict)
        words = shlex.split(list2cmdline(shlex.split(spec["entrypoint"])))
        commands = words[-1].split(" && ") if name == "chain" else [" ".join(words)]
        assert words[:2] == ["sh", "-c"] if name == "chain" else f"jobs.{name}" in words
        for command in commands:
            configure(command, run_yaml(folder), tmp_path)


def check_nightly(config: RunConfig) -> None:
    """Yesterday's file to yesterday's folder, told by the UTC date."""
    day = config.batch.partition
    assert day is not None and date.fromisoformat(day) in {datetime.now(UTC).date() - timedelta(days) for days in (1, 2)}
    assert day in str(config.batch.source) and day in str(config.batch.target)


def check_same_day(schedule: str, seconds: int) -> None:
    """The latest start of the latest try still means the same `yesterday`."""
    minute, hour = (int(word) for word in schedule.split()[:2])
    assert hour * 3600 + minute * 60 + seconds < 24 * 3600


def test_ray_cron_job(tmp_path: Path) -> None:
    """It is not applied by default, and says which gate it needs."""
    values = load("base/service/raycronjob.yaml")
    assert "raycronjob.yaml" not in load("base/service/kustomization.yaml")["resources"]
    assert "--feature-gates=RayCronJob=true" in (CLUSTER / "base/service/raycronjob.yaml").read_text(encoding="utf-8")
    spec = values["spec"]["jobTemplate"]
    check_cluster(spec["rayClusterSpec"])
    assert len(values["spec"]["schedule"].split()) == 5 and values["spec"]["timeZone"] == "Etc/UTC"
    check_same_day(values["spec"]["schedule"], spec["activeDeadlineSeconds"])
    check_nightly(configure(spec["entrypoint"], run_yaml("base"), tmp_path))
    assert len(values["metadata"]["name"]) <= 36


def test_the_loop_now_and_then(tmp_path: Path) -> None:
    """It is not applied by default either."""
    values = load("base/service/loop.yaml")
    assert "loop.yaml" not in load("base/service/kustomization.yaml")["resources"]
    spec = values["spec"]["jobTemplate"]
    check_cluster(spec["rayClusterSpec"])
    assert len(values["spec"]["schedule"].split()) == 5 and values["spec"]["timeZone"] == "Etc/UTC"
    config = configure(spec["entrypoint"], run_yaml("base"), tmp_path)
    assert date.fromisoformat(config.loop.turn()) and config.name == configure(
        "python -m jobs.train --config /etc/hydra-heads/config/run.yaml", run_yaml("base"), tmp_path).name


def test_cron_batch(tmp_path: Path) -> None:
    """A client of the endpoint, with a key."""
    values = load("base/service/nightly.yaml")
    spec = values["spec"]
    assert (values["apiVersion"], values["kind"]) == ("batch/v1", "CronJob")
    assert len(spec["schedule"].split()) == 5 and spec["timeZone"] == "Etc/UTC" and spec["concurrencyPolicy"] == "Forbid"
    job = spec["jobTemplate"]["spec"]
    check_same_day(spec["schedule"], spec["startingDeadlineSeconds"] + job["activeDeadlineSeconds"])
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (container,) = job["template"]["spec"]["containers"]
    config = configure(" ".join(container["command"]), run_yaml("base"), tmp_path)
    check_nightly(config)
    (service,) = of_kind(built("base/service"), "RayService")
    assert config.batch.address == f"http://{service['metadata']['name']}-serve-svc:{config.serve.port}"
    assert config.batch.key_variable in {one["name"] for one in container["env"]}
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_runtime_env() -> None:
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**load("runtime_env.yaml"))
    for job in of_kind(built("base/jobs"), "RayJob"):
        assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"] == load("runtime_env.yaml")["env_vars"]


def test_ray_is_the_version_that_the_package_pins() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (pinned,) = [one.partition("==")[2] for one in needs if one.startswith("ray[")]
    found = {(one["kind"], version) for _, _, resources in variants() for one in resources
             for version in values_of(one, "rayVersion")}
    assert found == {("RayJob", pinned), ("RayService", pinned)}
    assert [values_of(load(f"base/service/{name}.yaml"), "rayVersion") for name in ("raycronjob", "loop")] == [[pinned]] * 2


def test_ports_routes_and_names_are_the_defaults() -> None:
    """What the pages say of `hydra-heads serve` holds for the manifests too: one port, one name, one route, one image."""
    usual = RunConfig(storage="/data")
    (service,) = of_kind(built("base/service"), "RayService")
    for values in (load("serve_config.yaml"), yaml.safe_load(service["spec"]["serveConfigV2"])):
        (application,) = values["applications"]
        assert (values["http_options"]["port"], application["name"], application["route_prefix"]) == (
            usual.serve.port, usual.serve.app_name, ROUTE)
    ports = {port["name"]: port["containerPort"] for port in values_of(
        service["spec"]["rayClusterConfig"]["headGroupSpec"], "ports")[0]}
    assert (ports["dashboard"], ports["gcs-server"], ports["serve"]) == (DEFAULT_DASHBOARD_PORT, DEFAULT_PORT, usual.serve.port)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    images = {image for _, _, resources in variants() for image in values_of(resources, "image")}
    assert {image for image in images if image.startswith("hydra-heads")} == {
        f"hydra-heads:{version}", f"hydra-heads-cuda:{version}"}
    assert all(re.fullmatch(r"[a-z-]+:[0-9.]+", image) for image in images)  # none floats


def test_pods_can_load_a_gated_model_once() -> None:
    """Every Ray pod has the hub's token, which is left out where there is no such secret, and one cache on the shared folder."""
    for kind, part, count in (("RayJob", "jobs", 17), ("RayService", "service", 2)):
        containers = [one for resource in of_kind(built(f"base/{part}"), kind)
                      for found in values_of(resource, "containers") for one in found if one["name"].startswith("ray-")]
        assert len(containers) == count
        for container in containers:
            variables = {one["name"]: one for one in container["env"]}
            assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hf-token", "key": "token", "optional": True}
            assert variables["HF_HOME"]["value"].startswith(
                next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared"))


def test_every_secret_is_created_and_none_has_a_value_here() -> None:
    """The script creates every secret, with every key, that a manifest names."""
    script = (CLUSTER / "create_secrets.sh").read_text(encoding="utf-8")
    subprocess.run(["sh", "-n", str(CLUSTER / "create_secrets.sh")], check=True)
    made = {found[1]: set(re.findall(r"--from-(?:literal|file)=(\w+)=", found[2]))
            for found in re.finditer(r"create secret generic (\S+)(.*)", script)}
    for _, _, resources in variants():
        assert not of_kind(resources, "Secret")
        for reference in values_of(resources, "secretKeyRef"):
            assert reference["key"] in made[reference["name"]], reference
        assert {one["name"] for one in values_of(resources, "secretRef")} <= set(made)
        assert {one["secretName"] for one in values_of(resources, "secret")} <= set(made)
    for value in re.findall(r"--from-literal=\w+=(\S+)", script):
        assert value.startswith(('"$', '"${')), "no value is written down"
    assert "auth_token" in made["hydra-heads-ray-token"]  # the key that the operator reads


def test_pods_are_an_ordinary_user_s() -> None:
    """Pod Security's `restricted`, in every pod that is written here."""
    for _, _, resources in variants():
        for spec in [one for name in ("template", "submitterPodTemplate") for pod in values_of(resources, name)
                     if (one := pod.get("spec")) and "containers" in one]:
            assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in spec["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert {"requests", "limits"} <= set(container["resources"])


def test_alerts_name_metrics_that_exist() -> None:
    """Every series of ours is exported, and every one of the platform's is known; brackets match."""
    (rules,) = of_kind(built("base/platform"), "PrometheusRule")
    every = [rule for group in rules["spec"]["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in every}) == len(every) >= 12
    for rule in every:
        text = re.sub(r'"[^"]*"', '""', rule["expr"])
        named = {word for word in re.findall(r"\b(?:ray|kube|kubelet)_\w+", text)}
        assert named and named <= series() | PLATFORM_METRICS, rule["expr"]
        assert all(text.count(left) == text.count(right) for left, right in ("()", "[]", "{}"))
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("critical", "warning")


def test_network_policies_name_pods_and_ports_that_exist() -> None:
    """Ports of our own, and labels of pods that are written here or by the operator."""
    resources = built("base/platform")
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(resources, "NetworkPolicy")}
    assert set(policies) == {f"hydra-heads-{name}" for name in ("ray", "mlflow", "postgres", "redis")}
    for name in ("mlflow", "postgres", "redis"):
        (service,) = [one for one in of_kind(resources, "Service") if one["metadata"]["name"] == f"hydra-heads-{name}"]
        spec = policies[f"hydra-heads-{name}"]
        assert spec["podSelector"]["matchLabels"] == service["spec"]["selector"]
        assert [port["port"] for rule in spec["ingress"] for port in rule["ports"]] == [
            port["port"] for port in service["spec"]["ports"]]
    assert policies["hydra-heads-ray"]["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}


def test_the_mlflow_server_s_command_is_one() -> None:
    """MLflow's own parser takes it, and the server answers under the name at which pods ask."""
    import mlflow.cli

    (server,) = of_kind(built("base/platform"), "Deployment")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["mlflow", "server"]
    given = mlflow.cli.cli.commands["server"].make_context("server", container["command"][2:]).params
    (job, *_) = of_kind(built("base/jobs"), "RayJob")
    (uri,) = {one["value"] for found in values_of(job, "env") for one in found if one["name"] == "MLFLOW_TRACKING_URI"}
    assert uri.removeprefix("http://") in given["allowed_hosts"].split(",")
    assert given["artifacts_destination"] == "/mnt/shared/mlflow" and given["host"] == "0.0.0.0"


@pytest.mark.parametrize("name", ["machines", "aws"])
def test_the_launchers_files(name: str) -> None:
    """Ray's own schema; nothing is written where an ordinary user may not; the head finds the `python` of an entry point."""
    import json

    import jsonschema
    import ray.autoscaler

    values = load(f"launcher/{name}.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(values, schema)
    assert all(path.startswith("~/") for path in values["file_mounts"])
    assert not re.search(r"(?<!\S)/opt|/usr", str(values))
    for kind in ("head", "worker"):
        (started,) = [command for command in values[f"{kind}_start_ray_commands"] if "ray start" in command]
        assert started.startswith("export PATH=$HOME/hydra-heads-venv/bin:$PATH RAY_AUTH_MODE=token; ")
        assert re.findall(r"(?:--port=|HEAD_IP:)(\d+)", started) == [str(DEFAULT_PORT)]


def test_no_python_here() -> None:
    assert not list(CLUSTER.rglob("*.py"))
