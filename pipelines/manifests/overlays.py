"""Variants of one set of manifests, and what differs between them as patches for kustomize."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pipelines.config import RunConfig
from pipelines.manifests.target import APP, Json, Target
from pipelines.manifests.yaml_text import to_yaml

SPOT_LABEL = "cloud.google.com/gke-spot=true"


@dataclass(frozen=True)
class Overlay:
    """`about`: one line for people; `values`: dotted settings that the variant changes; `needs_gpus`: only of a base with some;
    `alone`: the settings of the run are the defaults, not the base's."""

    about: str
    values: Callable[[RunConfig], Json]
    needs_gpus: bool = True
    alone: bool = False

    def target(self, config: RunConfig) -> Target:
        """The variant of the base `config`. Raises InputError for values that do not fit together."""
        values = config.model_dump(mode="json", by_alias=True, exclude_unset=True) | {"storage": config.storage}
        if self.alone:
            values = {name: value for name, value in values.items() if name in ("storage", "cluster")}
        now = RunConfig.model_validate(values).model_dump(mode="json", by_alias=True)
        for dotted, value in self.values(config).items():
            *sections, name = dotted.split(".")
            if reduce(dict.__getitem__, sections, now)[name] == value:
                continue
            node = values
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
        return Target(RunConfig.model_validate(values)).check()


def _cpu_test(config: RunConfig) -> Json:
    """Small enough for a laptop's kind or minikube: the embedded base, a few rows and steps."""
    return {"name": "cpu-test", "prompts.count": 64, "prompts.max_tokens": 48, "distill.max_new_tokens": 32,
            "train.max_steps": 40, "train.rows_per_step": 8, "train.workers.count": 2,
            "train.drafters": {"hydra": {"kind": "hydra", "draft_vocab_size": 4096}},
            "bench.limit": 6, "bench.max_new_tokens": 32, "bench.identity_prompts": 2, "batch.limit": 16, "serve.model": "plain",
            "cluster.image": None, "cluster.nodes": 1, "cluster.min_nodes": 1, "cluster.max_nodes": 1, "cluster.cpus": 2,
            "cluster.memory": "6Gi", "cluster.gpus": 0, "cluster.gpu_label": None, "cluster.spot_label": None,
            "cluster.head_cpus": 1, "cluster.head_memory": "4Gi", "cluster.claim_size": "10Gi",
            "cluster.access_mode": "ReadWriteOnce"}


def _nodes(config: RunConfig, nodes: int) -> Json:
    """All GPUs of `nodes` worker pods, one for each worker."""
    count = nodes * config.cluster.gpus
    return {"cluster.nodes": nodes, "distill.workers.count": count, "train.workers.count": count}


def _four_nodes(config: RunConfig) -> Json:
    gpus = config.cluster.gpus
    return _nodes(config, 4) | {"cluster.min_nodes": 1, "cluster.max_nodes": 4, "serve.replicas": gpus,
                                "serve.max_replicas": 4 * gpus, "cluster.queue": APP}


OVERLAYS = {
    "cpu-test": Overlay("a try on a laptop's kind or minikube, with the embedded base", _cpu_test, needs_gpus=False, alone=True),
    "one-gpu-node": Overlay("one node", lambda config: _nodes(config, 1)),
    "four-gpu-nodes": Overlay("four nodes, an endpoint that scales from one to four, and jobs in a queue of Kueue", _four_nodes),
    "spot": Overlay(f"workers on nodes that may be taken away, here by the label of GKE ({SPOT_LABEL})",
                    lambda config: {"cluster.spot_label": SPOT_LABEL}),
}
"""Name of a folder below `overlays/` -> what differs there from `base/`."""


def differences(before: Any, after: Any, path: str = "") -> list[Json]:
    """The operations of a JSON patch that make `after` of `before`. Lists of unequal length are replaced as a whole."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: list[Json] = []
        for name in [*before, *(name for name in after if name not in before)]:
            at = f"{path}/{name.replace('~', '~0').replace('/', '~1')}"
            if name not in after:
                found.append({"op": "remove", "path": at})
            elif name not in before:
                found.append({"op": "add", "path": at, "value": after[name]})
            else:
                found += differences(before[name], after[name], at)
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [one for number, pair in enumerate(zip(before, after, strict=True))
                for one in differences(*pair, f"{path}/{number}")]
    return [] if before == after else [{"op": "replace", "path": path, "value": after}]


def patches(before: list[Json], after: list[Json]) -> tuple[list[Json], list[Json]]:
    """(patches for kustomize, resources that `before` lacks). Resources of a kind with the same differences share a patch."""
    old, new = ({(one["kind"], one["metadata"]["name"]): one for one in group} for group in (before, after))
    groups: dict[tuple[str, str], list[str]] = {}
    for key, resource in old.items():
        kind, name = key
        if key not in new:
            text = to_yaml({"$patch": "delete", "apiVersion": resource["apiVersion"], "kind": kind, "metadata": {"name": name}})
        elif operations := differences(resource, new[key]):
            text = to_yaml(operations)
        else:
            continue
        groups.setdefault((kind, text), []).append(name)
    found = [{"target": {"kind": kind, "name": names[0] if len(names) == 1 else f"({'|'.join(names)})"}, "patch": text}
             for (kind, text), names in groups.items()]
    return found, [resource for key, resource in new.items() if key not in old]
