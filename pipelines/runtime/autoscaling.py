"""Room that is not there now: it is waited for with a line a minute, and clusters that start nodes on demand are asked for it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.state import state
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import placement_group, remove_placement_group

from pipelines.runtime.console import say

PATIENCE_SECONDS = 30.0
"""How long an autoscaler may take to begin with a node that it is asked for."""
SAY_SECONDS = 60.0


def may_grow() -> bool:
    """Whether an autoscaler runs that starts nodes. Ray runs one without node types of its own in every other cluster."""
    status = _status()
    names = {*status.get("types", ()), *status.get("coming", ())}
    return any(name not in {f"node_{node['NodeID']}" for node in ray.nodes()} for name in names)


def comes_when_asked(resources: Mapping[str, float], stage: str) -> bool:
    """Ask the autoscaler for `resources` on one node, and wait as long as it starts nodes or fails to; returns whether they have
    come. A cluster without an autoscaler is not asked."""
    if not may_grow():
        return False
    words = amounts(resources)
    say(stage, f"there is no node with {words} now: asks the cluster's autoscaler for one")
    if _waits(resources, stage, PATIENCE_SECONDS):
        return True
    say(stage, f"the autoscaler starts no node with {words}")
    return False


def wait_for_room(resources: Mapping[str, float], stage: str) -> None:
    """Return when one node has `resources` free, with a line a minute until then. An autoscaler sees that they are wanted."""
    if not any(all(node.get(kind, 0.0) >= amount for kind, amount in resources.items())
               for node in state.available_resources_per_node().values()):
        _waits(resources, stage, math.inf)


def _waits(resources: Mapping[str, float], stage: str, patience: float) -> bool:
    """Wait until one node has `resources` free: True. False if for `patience` seconds no node was being started."""
    group = placement_group([dict(resources)])
    begun = said = last_seen = time.monotonic()
    try:
        while not group.wait(1):
            now = time.monotonic()
            if _status().get("coming"):
                last_seen = now
            if now - last_seen > patience:
                return False
            if now - said >= SAY_SECONDS:
                said, free = now, amounts({kind: ray.available_resources().get(kind, 0.0) for kind in resources})
                say(stage, f"waits for {amounts(resources)} on one node, {now - begun:.0f} s until now: {free} are free in the "
                           "cluster")
        return True
    finally:
        remove_placement_group(group)


def fits(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    """How many times `each` fits into what a node has; Ray counts in ten-thousandths."""
    needs = {kind: round(amount * 10_000) for kind, amount in each.items() if round(amount * 10_000)}
    return min((round(node.get(kind, 0.0) * 10_000) // amount for kind, amount in needs.items()), default=2**31)


def amounts(resources: Mapping[str, float]) -> str:
    """Resources as they are said."""
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def _status() -> dict[str, Any]:
    """`types` of nodes that there are, and those that are `coming`, which the autoscaler of this cluster starts or fails to."""
    if is_autoscaler_v2():
        from ray.autoscaler.v2.sdk import get_cluster_status

        found = get_cluster_status(ray.get_runtime_context().gcs_address)
        now: list[Any] = [*found.active_nodes, *found.idle_nodes]
        coming: list[Any] = [*found.pending_nodes, *found.pending_launches, *found.failed_launches]
        return {name: [node.ray_node_type_name for node in nodes] for name, nodes in (("types", now), ("coming", coming))}
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}").get("autoscaler_report") or {}
    tried = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    return {"types": [*report.get("active_nodes", {}), *(report.get("idle_nodes") or {})],
            "coming": [*report.get("pending_launches", {}), *(one[1] for one in report.get("pending_nodes", [])),
                       *(name for name, found in tried.items() if not found.get("is_available", True))]}
