"""Serve's own choice of a replica, without those that cannot answer.

Serve sends this module by value: what processes share is in `replica_states`.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter  # Serve's default; its parts alone are public

from pipelines.serve.replica_states import states_of


class StatesRouter(PowerOfTwoChoicesRequestRouter):
    """Passes on what replicas tell of themselves, and avoids one that has failed or has just refused, where another is there."""

    def update_replicas(self, replicas: list[Any]) -> None:
        super().update_replicas(replicas)
        states = states_of(self.app_name)
        states.waiting = lambda: self.num_pending_requests
        states.update({replica.replica_id.unique_id: dict(replica.routing_stats or {}) for replica in replicas})

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        states_of(self.app_name).forget(replica_id.unique_id)

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        chosen = await super().choose_replicas(candidate_replicas, pending_request)
        usable = states_of(self.app_name).usable
        if not any(usable(replica.unique_id) for replica in self.curr_replicas):
            return chosen
        return [[replica for replica in rank if usable(replica.replica_id.unique_id)] for rank in chosen]
