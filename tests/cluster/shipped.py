"""The manifests of cluster/, as tests read them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.runner import STAGES, read_config
from pipelines.config import RunConfig
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
PARTS = ("platform", "jobs", "service")
OVERLAYS = sorted(path.name for path in (CLUSTER / "overlays").iterdir())
CONFIG = "/etc/hydra-heads/config/run.yaml"
"""Where pods have the settings."""


def documents(path: str | Path) -> list[Any]:
    """All YAML documents of a file of cluster/."""
    return list(yaml.safe_load_all((CLUSTER / path).read_text(encoding="utf-8")))


def load(path: str) -> Any:
    """The only document of a file, or its first."""
    return documents(path)[0]


def built(folder: str) -> list[Any]:
    """The resources of a kustomization, with its JSON patches applied: what `kubectl kustomize` prints."""
    values = load(f"{folder}/kustomization.yaml")
    found: list[Any] = []
    for name in values["resources"]:
        path = (CLUSTER / folder / name).resolve().relative_to(CLUSTER)
        found += built(str(path)) if (CLUSTER / path).is_dir() else documents(path)
    for change in values.get("patches", ()):
        patch = yaml.safe_load(change["patch"])
        aimed = [one for one in found if one["kind"] == change["target"]["kind"]
                 and re.fullmatch(change["target"]["name"], one["metadata"]["name"])]
        assert aimed, change["target"]
        for one in aimed:
            if isinstance(patch, dict):
                assert patch["$patch"] == "delete"
                found.remove(one)
            else:
                apply(one, copy.deepcopy(patch))
    return found


def apply(resource: Any, operations: list[Any]) -> None:
    """Apply a JSON patch (RFC 6902, of which `add`, `remove` and `replace` are used) in place."""
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        node = resource
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        key: Any = int(last) if isinstance(node, list) else last
        if operation["op"] == "remove":
            del node[key]
        else:
            assert operation["op"] in ("add", "replace") and (operation["op"] == "add" or isinstance(node, list) or key in node)
            node[key] = operation["value"]


def variants() -> Iterator[tuple[str, str, list[Any]]]:
    """(folder, part, resources) of base and every overlay."""
    for folder in ("base", *(f"overlays/{name}" for name in OVERLAYS)):
        for part in PARTS:
            yield folder, part, built(f"{folder}/{part}")


def of_kind(resources: list[Any], kind: str) -> list[Any]:
    return [one for one in resources if one["kind"] == kind]


def values_of(node: Any, name: str) -> list[Any]:
    """Every value that stands under `name` anywhere in a manifest."""
    if isinstance(node, dict):
        return [value for key, value in node.items() if key == name] + [
            found for value in node.values() for found in values_of(value, name)]
    return [found for value in node for found in values_of(value, name)] if isinstance(node, list) else []


def configure(command: str, run_yaml: str, folder: Path) -> RunConfig:
    """What a command of a manifest is configured as, with the ConfigMap's settings in place of the mounted file."""
    found = re.fullmatch(r"python -m jobs\.(\w+) --config (\S+)((?: \S+=\S+)*)", command)
    assert found and found[1] in STAGES and found[2] == CONFIG, command
    path = folder / "run.yaml"
    path.write_text(run_yaml, encoding="utf-8")
    return read_config(found[1], str(path), found[3].split())
