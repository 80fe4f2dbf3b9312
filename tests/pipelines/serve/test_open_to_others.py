"""An endpoint that others on the network reach: whoever starts it is told what they may do."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hydra_core.errors import InputError
from pipelines.config import load_config
from pipelines.serve import instance, stage
from pipelines.serve.api_keys import VARIABLE
from pipelines.serve.instance import Instance
from pipelines.serve.messages import AppArgs

ARGS = {"base": {}, "cache": "", "configuration": None, "label": "plain"}
KEYS = {"api_key_digests": ("0" * 64,)}


@pytest.mark.parametrize(("settings", "keys", "told"), [
    ({"serve.host": "127.0.0.1"}, {}, ""), ({"serve.host": "0.0.0.0"}, {}, "no API keys are set: anybody may send requests"),
    ({"serve.host": "0.0.0.0"}, KEYS, "API keys travel there in clear text"),
    ({"serve.host": "0.0.0.0", "serve.tls_keyfile": "/k", "serve.tls_certfile": "/c"}, KEYS, "")])
def test_the_command_tells(capsys: pytest.CaptureFixture[str], settings: dict[str, object], keys: dict[str, tuple[str]],
                           told: str) -> None:
    stage._warn(load_config(None, {"storage": "/s"} | settings), AppArgs(**ARGS, **keys))
    found = capsys.readouterr().err
    assert told in found if told else not found


@pytest.mark.parametrize(("url", "keys", "warns"), [
    ("http://0.0.0.0:8000", {}, True), ("http://0.0.0.0:8000", KEYS, False), ("http://127.0.0.1:8000", {}, False),
    (None, {}, False)])
def test_a_deployed_application_tells(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, url: str | None,
                                      keys: dict[str, tuple[str]], warns: bool) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(stage, "ray", SimpleNamespace(is_initialized=lambda: True))
    monkeypatch.setattr(stage, "running_instance", lambda: Instance(url))
    monkeypatch.setattr(stage, "build", lambda args: args)
    monkeypatch.setattr(stage.log, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=stage.log.name):
        assert stage.build_app({**ARGS, **keys, "cors_origins": ["*"]}) == replace(AppArgs(**ARGS, **keys), cors_origins=("*",))
    assert ("anybody may send requests" in caplog.text) == warns


@pytest.mark.parametrize("origins", ["https://chat.example", [1], {"a": 1}, 3])
def test_origins_are_a_list_of_texts(origins: object) -> None:
    with pytest.raises(InputError, match=r"args\.cors_origins=.*: is no list of texts"):
        stage.build_app({**ARGS, "cors_origins": origins})


def test_no_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "build", lambda args: args)
    assert stage.build_app({**ARGS, "cors_origins": None}).cors_origins == ()


def test_a_deployed_application_needs_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be set where one types `serve deploy`, and nowhere else."""
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(InputError, match=r"serve\.require_keys=true: there is no API key"):
        stage.build_app({**ARGS, "require_keys": True})


@pytest.mark.parametrize(("listens", "asked"), [
    ("http://0.0.0.0:8000", "http://10.0.0.7:8000"), ("https://0.0.0.0:443", "https://10.0.0.7:443"),
    ("http://127.0.0.1:8000", "http://127.0.0.1:8000"), ("http://host.example:80", "http://host.example:80"), ("", "")])
def test_an_address_that_is_told_is_one_to_ask_at(monkeypatch: pytest.MonkeyPatch, listens: str, asked: str) -> None:
    context = SimpleNamespace(gcs_address="10.0.0.7:6379")
    monkeypatch.setattr(instance, "ray", SimpleNamespace(get_runtime_context=lambda: context))
    assert instance.reachable(listens) == asked
