"""What is known of replicas without asking them, and which of them get requests."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID

from pipelines.serve import replica_states
from pipelines.serve.replica_states import AVOIDED_SECONDS, ReplicaStates
from pipelines.serve.router import PowerOfTwoChoicesRequestRouter, StatesRouter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_reports_have_an_age_and_go_with_their_replica() -> None:
    clock = Clock()
    states = ReplicaStates(clock)
    assert states.infos() == [] and states.age() == 0
    states.update({"a": {"at": 1}, "b": {}})
    clock.now += 3
    states.update({"a": {"at": 1}, "b": {"at": 5}})
    assert states.infos() == [{"at": 1}, {"at": 5}] and states.age() == 3
    states.update({"b": {"at": 5}})
    clock.now += 1
    assert states.infos() == [{"at": 5}] and states.age() == 1


def test_the_age_of_a_report_that_comes_meanwhile() -> None:
    """Serve's thread replaces what is known while a request asks."""
    states = ReplicaStates(Clock())
    states.replicas = {"new": {"at": 1}}
    assert states.age() == 0
    states.update({"new": {"at": 1}})
    assert states.age() == 0


def test_what_refused_or_failed_is_avoided_for_a_while() -> None:
    clock = Clock()
    states = ReplicaStates(clock)
    states.update({"a": {"failed": False}, "b": {"failed": True}, "c": {}})
    assert [states.usable(name) for name in "abc"] == [True, False, True]
    states.avoid("a")
    states.avoid(None)
    assert not states.usable("a")
    clock.now += AVOIDED_SECONDS
    assert states.usable("a")


@pytest.mark.parametrize(("failed", "left"), [((), ["a", "b"]), (("a",), ["b"]), (("a", "b"), ["a", "b"])])
def test_the_router_keeps_to_those_that_can_answer(monkeypatch: pytest.MonkeyPatch, failed: tuple[str, ...],
                                                   left: list[str]) -> None:
    monkeypatch.setattr(replica_states, "_OF", {})
    replicas: list[Any] = [SimpleNamespace(replica_id=ReplicaID(name, DeploymentID("DecodeServer", "app")),
                                           routing_stats={"failed": name in failed}) for name in "ab"]

    async def both(self: Any, candidates: Any, request: Any = None) -> Any:
        return [replicas]

    monkeypatch.setattr(PowerOfTwoChoicesRequestRouter, "update_replicas", lambda self, found: None)
    monkeypatch.setattr(PowerOfTwoChoicesRequestRouter, "choose_replicas", both)
    monkeypatch.setattr(StatesRouter, "app_name", "app")
    monkeypatch.setattr(StatesRouter, "num_pending_requests", 7)
    monkeypatch.setattr(StatesRouter, "curr_replicas", {replica.replica_id: replica for replica in replicas})
    router = object.__new__(StatesRouter)
    router.update_replicas(replicas)
    assert replica_states.states_of("app").replicas == {name: {"failed": name in failed} for name in "ab"}
    assert replica_states.states_of("app").waiting() == 7
    monkeypatch.setattr(PowerOfTwoChoicesRequestRouter, "on_replica_actor_died", lambda self, found: None)
    (chosen,) = asyncio.run(router.choose_replicas(replicas))
    assert [replica.replica_id.unique_id for replica in chosen] == left
    router.on_replica_actor_died(replicas[0].replica_id)
    assert list(replica_states.states_of("app").replicas) == ["b"]
