"""How an application is stopped: what it accepted first, and never with an error over another one."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from hydra_core.errors import InputError
from pipelines.serve import served_app
from pipelines.serve.instance import Application, Instance
from pipelines.serve.served_app import ServedApp


class Cluster:
    """Serve with one application, whose front tells `left` answers in flight, one number after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: list[Any], url: str | None = "http://x", others: int = 0) -> None:
        self.left, self.url, self.others = left, url, others
        self.done, self.there = list[str](), True
        monkeypatch.setattr(serve, "get_deployment_handle", lambda name, app: SimpleNamespace(close=SimpleNamespace(
            remote=lambda: SimpleNamespace(result=lambda timeout_s: self.next("close")))))
        monkeypatch.setattr(served_app, "ask_front", lambda name, seconds: {"in_flight": self.next("ask")})
        monkeypatch.setattr(serve, "delete", self.delete)
        monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=["it"] if self.there else []))
        monkeypatch.setattr(served_app, "running_instance", self.instance)
        monkeypatch.setattr(serve, "shutdown", lambda: self.done.append("shutdown"))
        monkeypatch.setattr(served_app, "POLL_SECONDS", 0.001)

    def next(self, what: str) -> int:
        self.done.append(what)
        found = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        if isinstance(found, Exception):
            raise found
        return int(found)

    def delete(self, name: str, _blocking: bool) -> None:
        assert not _blocking  # Serve's own wait ends in a traceback
        self.done.append("delete")
        self.there = False

    def instance(self) -> Instance:
        return Instance(self.url, {f"other {i}": Application("RUNNING", None, {}) for i in range(self.others)})


def app(**changes: Any) -> ServedApp:
    return ServedApp(**({"name": "it", "url": "http://x", "label": "plain", "alone": True, "drain_seconds": 3600.0} | changes))


def test_answers_in_flight_are_finished_before_anything_is_removed(monkeypatch: pytest.MonkeyPatch,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(monkeypatch, [40, 17, 2, 0])
    app().stop()
    assert cluster.done == ["close", "ask", "ask", "ask", "delete", "shutdown"]
    assert "finishing 40 answers, for at most serve.drain_seconds=3600" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["time", "signal"])
def test_a_limit_or_a_second_signal_ends_the_wait(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                  how: str) -> None:
    cluster, hurry = Cluster(monkeypatch, [5]), threading.Event()
    if how == "signal":
        hurry.set()
    app(drain_seconds=0.01 if how == "time" else 3600.0).stop(hurry)
    assert "5 answers are cut off" in capsys.readouterr().err and cluster.done[-2:] == ["delete", "shutdown"]


@pytest.mark.parametrize(("alone", "url", "others", "ends"), [
    (True, "http://x", 0, True), (False, "http://x", 0, False), (True, "http://x", 1, False), (False, None, 0, True),
    (False, None, 1, False)])
def test_serve_ends_with_the_last_that_needs_it(monkeypatch: pytest.MonkeyPatch, alone: bool, url: str | None, others: int,
                                                ends: bool) -> None:
    cluster = Cluster(monkeypatch, [0], url, others)
    app(alone=alone).stop()
    assert ("shutdown" in cluster.done) == ends and "delete" in cluster.done


def test_stopping_hides_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(monkeypatch, [InputError("it does not answer")])
    monkeypatch.setattr(serve, "shutdown", lambda: (_ for _ in ()).throw(TimeoutError("after 60s\nand more")))
    with pytest.raises(InputError, match="the real one"):
        try:
            raise InputError("the real one")
        finally:
            app().stop()
    told = capsys.readouterr().err
    assert "may have unfinished answers: it does not answer" in told and "was not removed: after 60s\n" in told
    assert cluster.done == ["close", "delete"]
