"""Every manifest parses, and what it names exists."""

from __future__ import annotations

import importlib
import re
import tomllib
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.ray_constants import DEFAULT_DASHBOARD_PORT, DEFAULT_PORT
from ray.serve.schema import ServeDeploySchema

from jobs.runner import STAGES, read_config
from pipelines.config import RunConfig
from pipelines.serve.messages import AppArgs
from pipelines.serve.served_app import REMOVED_SECONDS
from pipelines.serve.stage import ROUTE
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def check_serve(values: dict[str, Any]) -> None:
    ServeDeploySchema.model_validate(values)
    for application in values["applications"]:
        module, name = application["import_path"].split(":")
        assert callable(getattr(importlib.import_module(module), name))
        AppArgs(**application["args"])


def check_entrypoint(text: str) -> RunConfig:
    """The command is one that runs here; returns what it would be configured as."""
    found = re.search(r"python -m jobs\.(\w+)(.*)", text)
    assert found and found[1] in STAGES
    words = found[2].split()
    config = words[words.index("--config") + 1] if "--config" in words else None
    overrides = [word for word in words if "=" in word]
    return read_config(found[1], str(ROOT / config) if config else None, overrides)


def check_nightly(config: RunConfig) -> None:
    """Yesterday's file to yesterday's folder, told by the UTC date."""
    day = config.batch.partition
    assert day is not None and date.fromisoformat(day) in {datetime.now(UTC).date() - timedelta(days) for days in (1, 2)}
    assert day in str(config.batch.source) and day in str(config.batch.target)


def check_same_day(schedule: str, seconds: int) -> None:
    """The latest start of the latest try still means the same `yesterday`."""
    minute, hour = (int(word) for word in schedule.split()[:2])
    assert hour * 3600 + minute * 60 + seconds < 24 * 3600


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.yaml")), ids=lambda path: path.name)
def test_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_serve_config() -> None:
    check_serve(load("serve_config.yaml"))


def test_rayservice_carries_the_serve_config() -> None:
    values = load("rayservice.yaml")
    assert (values["apiVersion"], values["kind"]) == ("ray.io/v1", "RayService")
    inner = yaml.safe_load(values["spec"]["serveConfigV2"])
    assert inner["http_options"].pop("host") == "0.0.0.0"  # others are to reach it, so it asks for keys
    (application,) = inner["applications"]
    keys = Path(application["args"].pop("api_keys_file"))
    assert application["args"].pop("require_keys") is True
    inner["http_options"]["host"] = "127.0.0.1"
    check_serve(inner)
    assert inner == load("serve_config.yaml")
    cluster = values["spec"]["rayClusterConfig"]
    check_cluster(cluster)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        mounted = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        (volume,) = [volume for volume in spec["volumes"] if volume["name"] == mounted[str(keys.parent)]]
        assert volume["secret"]["secretName"] and volume["secret"]["defaultMode"] == 0o400  # a file of keys is nobody else's
        assert spec["terminationGracePeriodSeconds"] >= application["args"]["drain_seconds"] + REMOVED_SECONDS


def check_cluster(spec: dict[str, Any]) -> None:
    assert spec["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize(("name", "kind"), [("rayjob.yaml", "RayJob"), ("raycronjob.yaml", "RayCronJob")])
def test_ray_jobs(name: str, kind: str) -> None:
    values = load(name)
    assert values["kind"] == kind
    spec = values["spec"] if kind == "RayJob" else values["spec"]["jobTemplate"]
    config = check_entrypoint(spec["entrypoint"])
    check_cluster(spec["rayClusterSpec"])
    assert spec["shutdownAfterJobFinishes"] is True
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"]), dict)
    if kind == "RayCronJob":
        assert len(values["spec"]["schedule"].split()) == 5 and values["spec"]["timeZone"] == "Etc/UTC"
        check_same_day(values["spec"]["schedule"], spec["activeDeadlineSeconds"])
        check_nightly(config)


def test_cron_batch() -> None:
    values = load("cron_batch.yaml")
    spec = values["spec"]
    assert (values["apiVersion"], values["kind"]) == ("batch/v1", "CronJob")
    assert len(spec["schedule"].split()) == 5 and spec["timeZone"] == "Etc/UTC" and spec["concurrencyPolicy"] == "Forbid"
    job = spec["jobTemplate"]["spec"]
    check_same_day(spec["schedule"], spec["startingDeadlineSeconds"] + job["activeDeadlineSeconds"])
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    command = job["template"]["spec"]["containers"][0]["command"]
    assert command[:3] == ["ray", "job", "submit"] and any(word.startswith("--address=http://") for word in command)
    assert not any(word.startswith("--submission-id") for word in command)  # a second try would be refused under the same
    check_nightly(check_entrypoint(" ".join(command)))


def test_runtime_env() -> None:
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**load("runtime_env.yaml"))


def values_of(node: Any, name: str) -> list[Any]:
    """Every value that stands under `name` anywhere in a manifest."""
    if isinstance(node, dict):
        return [value for key, value in node.items() if key == name] + [
            found for value in node.values() for found in values_of(value, name)]
    return [found for value in node for found in values_of(value, name)] if isinstance(node, list) else []


def test_ray_is_the_version_that_the_package_pins() -> None:
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    (pinned,) = [one.partition("==")[2] for one in needs if one.startswith("ray[")]
    found = {path.name: {str(version) for version in values_of(load(path.name), "rayVersion")} for path in CLUSTER.glob("*.yaml")}
    assert {name for name, versions in found.items() if versions} == {"rayjob.yaml", "raycronjob.yaml", "rayservice.yaml"}
    assert all(versions <= {pinned} for versions in found.values())


def test_ports_and_routes_are_those_of_the_code() -> None:
    config = read_config("serve", None, ["storage=/data"])
    for name in ("serve_config.yaml", "rayservice.yaml"):
        values = load(name)
        values = yaml.safe_load(values["spec"]["serveConfigV2"]) if name == "rayservice.yaml" else values
        assert values["http_options"]["port"] == config.serve.port
        assert [one["route_prefix"] for one in values["applications"]] == [ROUTE]
        assert [one["name"] for one in values["applications"]] == [config.serve.app_name]
    (command,) = [word for word in values_of(load("cron_batch.yaml"), "command")[0] if word.startswith("--address=")]
    service = load("rayservice.yaml")["metadata"]["name"]
    assert command == f"--address=http://{service}-head-svc:{DEFAULT_DASHBOARD_PORT}"
    started = "\n".join(values_of(load("ray_cluster.yaml"), "head_start_ray_commands")[0]
                        + values_of(load("ray_cluster.yaml"), "worker_start_ray_commands")[0])
    assert set(re.findall(r"(?:--port=|HEAD_IP:)(\d+)", started)) == {str(DEFAULT_PORT)}


def test_pods_can_load_a_gated_model_once() -> None:
    """Every pod has the hub's token, which is left out where there is no such secret, and one cache on the shared folder."""
    for name in ("rayjob.yaml", "raycronjob.yaml", "rayservice.yaml"):
        containers = [one for found in values_of(load(name), "containers") for one in found]
        assert len(containers) == 2
        for container in containers:
            variables = {one["name"]: one for one in container["env"]}
            assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hf-token", "key": "token", "optional": True}
            assert variables["HF_HOME"]["value"].startswith(
                next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared"))


def test_the_launchers_ray_finds_the_python_of_an_entrypoint() -> None:
    values = load("ray_cluster.yaml")
    for kind in ("head", "worker"):
        (started,) = [command for command in values[f"{kind}_start_ray_commands"] if "ray start" in command]
        assert started.startswith("PATH=/opt/hydra-heads-venv/bin:$PATH ray start ")


def test_no_python_here() -> None:
    assert not list(CLUSTER.rglob("*.py"))


def test_ports_routes_and_names_are_the_defaults() -> None:
    """What the pages say of `hydra-heads serve` holds for the manifests too: one port, one name, one image."""
    usual = RunConfig()
    for values in (load("serve_config.yaml"), yaml.safe_load(load("rayservice.yaml")["spec"]["serveConfigV2"])):
        (application,) = values["applications"]
        assert (values["http_options"]["port"], application["name"], application["route_prefix"]) == (
            usual.serve.port, usual.serve.app_name, "/")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    images = {found for path in CLUSTER.glob("*.yaml") for found in re.findall(r"image: (\S+)", path.read_text(encoding="utf-8"))}
    assert {image for image in images if image.startswith("hydra-heads")} == {f"hydra-heads:{version}"}
