"""An application ends with the command that started it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve

from pipelines.serve import owner
from pipelines.serve.owner import end_with, has_ended


class Known:
    """What a cluster says of its jobs."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def get_all_job_info(self, **asked: Any) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return {"x": SimpleNamespace(is_dead=self.found)} if self.found is not None else {}


@pytest.mark.parametrize(("found", "ended"), [(False, False), (True, True), (None, True), (ConnectionError("away"), False)],
                         ids=["lives", "dead", "forgotten", "nobody-says"])
def test_whether_the_owner_has_ended(found: Any, ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray._private.worker, "global_worker", SimpleNamespace(gcs_client=Known(found)))
    assert has_ended("01000000") is ended


def test_what_was_accepted_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in flight are waited for, for as long as an application may take to stop."""
    alive, left, done = [False, False, True], [3, 2, 1, 0], list[str]()
    monkeypatch.setattr(owner, "OWNER_SECONDS", 0.01)
    monkeypatch.setattr(owner, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(owner, "has_ended", lambda job: alive.pop(0))
    monkeypatch.setattr(serve, "delete", lambda name, _blocking: done.append(name))
    asyncio.run(end_with("01000000", "app", lambda: left.pop(0), 60.0))
    assert (alive, left, done) == ([], [], ["app"])

    alive[:], asked = [True], [0]

    def close() -> int:
        asked[0] += 1
        return 1

    asyncio.run(end_with("01000000", "other", close, 0.05))
    assert done == ["app", "other"] and asked[0] > 1
