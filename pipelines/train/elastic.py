"""Training with as many workers as there is room for: `train.workers.count: [least, most]`.

Ray's elastic policy asks an autoscaler for the most, begins with what has come, and looks again each minute. It counts what nodes
have in all, whoever uses it, and ends the workers at once where it resizes. Here the room counts that is free, and workers end
after a checkpoint of their running step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2.api.config import ScalingConfig

from pipelines.runtime.autoscaling import amounts, fits
from pipelines.train.notice import Notice, give

RESIZE_SECONDS = 60.0
"""Between two looks at the cluster for more room while workers train."""
RELEASE_SECONDS = 5.0
"""How long Ray may take to notice that a node is gone, or to give back what ended workers had."""


class FreeRoomPolicy(ElasticScalingPolicy):
    """Ray's elastic policy by the room that is free, without losing a step."""

    def __init__(self, scaling_config: ScalingConfig) -> None:
        super().__init__(scaling_config)
        self._nodes: list[str] = []
        """The node of each worker of the last group, which holds its room until the next one starts."""
        self._since: float | None = None
        self._looked = 0.0

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """With how many workers training starts, or goes on after some have ended."""
        self._maybe_send_resource_request()  # to an autoscaler, for the most
        now, room = time.monotonic(), self._room()
        self._since = self._since or now
        if room < self.scaling_config.max_workers and now - self._since < RELEASE_SECONDS:
            return NoopDecision()
        self._since, self._nodes, self._looked = None, [], now
        # With room for fewer Ray waits for it, and an autoscaler sees that it does.
        return self._get_resize_decision(max(room, self.scaling_config.min_workers))

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        """Never resizes at once: it tells the workers, which make a checkpoint and end, and then others are started."""
        self._maybe_send_resource_request()
        workers, now = worker_group_state.workers, time.monotonic()
        self._nodes = [worker.metadata.node_id for worker in workers]
        most = self.scaling_config.max_workers
        if len(workers) < most and now - self._looked >= self.scaling_config.elastic_resize_monitor_interval_s:
            self._looked = now
            if self._room() > len(workers):
                for worker in workers:
                    worker.execute_async(give, Notice.RESIZE)
        return NoopDecision()

    def _room(self) -> int:
        """How many workers fit, at most `max_workers`, into what is free or held by the last group; nodes that are about to go
        have none."""
        each = self.scaling_config._resources_per_worker_not_none
        leaving = state.get_draining_nodes()
        free = {name: node for name, node in state.available_resources_per_node().items() if name not in leaving}
        room = sum(fits(node, each) for node in free.values()) + sum(name in free for name in self._nodes)
        return min(room, self.scaling_config.max_workers)


def waiting_line(scaling: ScalingConfig) -> str:
    """What a training waits for."""
    each: Mapping[str, float] = scaling._resources_per_worker_not_none
    least, most = scaling.min_workers, scaling.max_workers
    count = f"{least}" if least == most else f"{least} to {most}"
    have = ray.available_resources()
    free = amounts({kind: have.get(kind, 0.0) for kind in each})
    return f"waits for {count} workers of {amounts(each)}: {free} are free in the cluster (a worker takes all from one node)"
