"""The order in which the command stops, and what an update keeps, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig, load_config
from pipelines.runtime.programs import stage_command
from pipelines.serve import stage
from pipelines.serve.instance import Application, Instance
from pipelines.serve.messages import AppArgs
from pipelines.serve.stage import UPDATED_WITH, run_serve, update_app

ARGS = AppArgs({"model": "m"}, "", None, "plain", api_key_digests=("new",))


@pytest.fixture
def config() -> RunConfig:
    return load_config(None, {"storage": "/s", "serve.api_keys_file": "/keys"})


@pytest.mark.parametrize("fails", ["", "telling", "tracker"])
def test_the_application_is_stopped_before_the_tracking_server_is_told(monkeypatch: pytest.MonkeyPatch, config: RunConfig,
                                                                       fails: str) -> None:
    """That server may be slow or gone, and answers in flight have `drain_seconds` from the signal on."""
    order: list[str] = []

    @contextmanager
    def tracked(*_: Any, **__: Any) -> Iterator[Any]:
        if fails == "tracker":
            raise StoppedError("tracking.uri: no server")
        try:
            yield SimpleNamespace(run_id="r")
        finally:
            order.append("told")

    def tell(*_: Any) -> None:
        if fails == "telling":
            raise RuntimeError("broken")

    app = SimpleNamespace(stop=lambda hurry: order.append("stopped"), url="u", label="plain")
    for name, value in {"Tracker": SimpleNamespace(open=lambda config: SimpleNamespace(start=tracked)),
                        "resolve_args": lambda config: ARGS, "ensure_ray": lambda config: nullcontext(), "_tell_addresses": tell,
                        "start_app": lambda config, args: app, "serving_params": lambda args: {}}.items():
        monkeypatch.setattr(stage, name, value)
    signalled = SimpleNamespace(started=SimpleNamespace(set=lambda: None), stopped=SimpleNamespace(wait=lambda seconds: True),
                                hurry=None)
    monkeypatch.setattr(stage, "_signals", lambda: nullcontext(signalled))
    if fails:
        with pytest.raises((RuntimeError, StoppedError)):
            run_serve(config)
    else:
        run_serve(config)
    assert order == {"": ["stopped", "told"], "telling": ["told", "stopped"], "tracker": ["stopped"]}[fails]


def test_the_printed_update_finds_the_keys_again(config: RunConfig) -> None:
    """Keys of the variable alone would replace those of the file."""
    assert "serve.api_keys_file=/keys" in stage_command(config, "serve", UPDATED_WITH, "--update")


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[AppArgs]:
    """What is deployed on an application with the keys `old`, whose only replica rejects all heads but its own."""
    found: list[AppArgs] = []
    heads = {"configuration": None, "label": "before", "version": None, "digest": None}
    told = {"base": "b", "label": "before", "configurations": ["c"], "rejected": {"reason": "missing"}}
    application = Application("RUNNING", "/", {})
    monkeypatch.setattr(stage, "_instance_with", lambda name: Instance("http://h:1", {name: application}))
    monkeypatch.setattr(stage, "model_digest", lambda args: SimpleNamespace(base="b", configuration="other"))
    monkeypatch.setattr(stage, "ask_replicas", lambda *_, **__: told)
    state = {"args": ARGS, "replicas": [{"heads": heads}], "api_key_digests": ("old",)}
    monkeypatch.setattr(stage, "ask_front", lambda name: state)
    monkeypatch.setattr(stage, "build", lambda args, *_: args)
    monkeypatch.setattr(stage.serve, "run", lambda args, **_: found.append(args))
    return found


def test_rejected_heads_leave_the_keys_as_they_were(deployed: list[AppArgs]) -> None:
    with pytest.raises(InputError, match="plain was rejected, before stays: missing"):
        update_app(ARGS)
    assert [(args.label, args.api_key_digests) for args in deployed] == [("plain", ("new",)), ("before", ("old",))]


def test_an_update_while_no_replica_runs_is_one_line(deployed: list[AppArgs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "ask_front", lambda name: {"args": ARGS, "replicas": [], "api_key_digests": ()})
    with pytest.raises(StoppedError, match="no replica of hydra-heads runs at this moment: try again when http://h:1/ready"):
        update_app(ARGS)
    assert not deployed
