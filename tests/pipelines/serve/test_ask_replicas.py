"""What an application tells of its replicas: all of them, and what each has tried; other programs are told apart."""

from __future__ import annotations

from typing import Any

import pytest

from hydra_core.errors import InputError, StoppedError
from pipelines.serve import instance
from pipelines.serve.instance import DECODER, FRONT, Application, Instance, ask_replicas
from tests.pipelines.serve.test_ingress import INFO


def running(monkeypatch: pytest.MonkeyPatch, *states: tuple[int, list[dict[str, Any]]],
            deployments: tuple[str, ...] = (FRONT, DECODER), seconds: float = 60.0) -> list[str]:
    """`states`: running replicas and what they told, one after the other, the last for ever. Returns the names that are asked."""
    left, asked = list(states), list[str]()

    def front(name: str, limit: float) -> dict[str, Any]:
        asked.append(name)
        count, infos = left.pop(0) if len(left) > 1 else left[0]
        return {"running": count, "replicas": infos}

    environments: dict[str, dict[str, Any]] = {name: {} for name in deployments}
    monkeypatch.setattr(instance, "ask_front", front)
    found = Instance("http://x", {"it": Application("RUNNING", "/", environments)})
    monkeypatch.setattr(instance, "running_instance", lambda: found)
    monkeypatch.setattr(instance, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(instance, "REPLICA_SECONDS", seconds)
    return asked


def test_every_replica_has_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = running(monkeypatch, (0, []), (2, [INFO]), (2, [INFO, INFO]))
    assert ask_replicas("it")["replicas"] == 2 and asked == ["it"] * 3


def test_every_replica_has_tried_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = INFO | {"tried": {"label": "old"}}, INFO | {"tried": {"label": "new"}, "label": "new"}
    asked = running(monkeypatch, (2, [old, old]), (2, [new, old]), (2, [new, new]))
    assert ask_replicas("it", tried={"label": "new"})["label"] == "new" and len(asked) == 3


def test_silence_and_other_programs_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    running(monkeypatch, (2, [INFO]), seconds=0.01)
    with pytest.raises(StoppedError, match=r"serve\.app_name=it: its replicas tell nothing \(1 of 2 do\)"):
        ask_replicas("it")
    asked = running(monkeypatch, (1, [INFO]), deployments=("Neighbour",))
    with pytest.raises(InputError, match="is another application, without Ingress and DecodeServer: choose another name"):
        ask_replicas("it")
    assert not asked
