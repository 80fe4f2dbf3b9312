"""What is turned away before it is read, and which keys open the endpoint."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from hydra_core.errors import InputError
from pipelines.serve.api_keys import VARIABLE, key_digests, opens
from pipelines.serve.middleware import Limits, RequestMiddleware

KEY = "0123456789abcdef-of-this-test"


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(**changes: Any) -> list[tuple[str, int]]:
        counted: list[tuple[str, int]] = []
        monkeypatch.setattr(RequestMiddleware, "limits", Limits(**{
            "max_body_bytes": 10, "count": lambda route, status, seconds: counted.append((route, status)), **changes}))
        return counted
    monkeypatch.setattr(RequestMiddleware, "limits", None)
    return put


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def ask(parts: list[bytes], path: str = "/v1/models", headers: tuple[tuple[bytes, bytes], ...] = (), ends: bool = True) -> Any:
    """Status and body for a request whose body comes in `parts`; without `ends` the last never comes."""
    left = [{"type": "http.request", "body": part, "more_body": not ends or number < len(parts) - 1}
            for number, part in enumerate(parts)]
    sent: list[Any] = []

    async def receive() -> Any:
        if left:
            return left.pop(0)
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(RequestMiddleware(echo)({"type": "http", "path": path, "headers": list(headers)}, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_nobody_is_let_in_before_the_limits_are_known(limits: Any) -> None:
    assert ask([b""])[0] == 503


def test_a_body_passes_whole_or_not_at_all(limits: Any) -> None:
    counted = limits()
    assert ask([b"0123", b"456789"]) == (200, b"0123456789")
    status, body = ask([b"0123", b"4567890"])
    assert status == 413 and json.loads(body)["error"]["code"] == "request_too_large"
    assert ask([b""], headers=((b"content-length", b"9" * 30),))[0] == 413
    assert ask([b"x"], path="/v1/completions/../x")[0] == 200
    assert counted == [("/v1/models", 200), ("/v1/models", 413), ("/v1/models", 413), ("other", 200)]


def test_a_body_that_does_not_come_is_not_waited_for(limits: Any) -> None:
    limits(body_seconds=0.05)
    assert ask([b"0"], ends=False)[0] == 408


def test_keys_open_all_but_probes(limits: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# one a line\n\n{KEY}\n", encoding="utf-8")
    limits(key_digests=key_digests(str(tmp_path / "keys")))
    assert ask([b""])[0] == 401 and ask([b""], headers=((b"authorization", b"Bearer \xff"),))[0] == 401
    assert ask([b""], headers=((b"Authorization", f"Bearer {KEY}".encode()),))[0] == 200
    assert ask([b""], path="/health")[0] == ask([b""], path="/ready")[0] == 200


def test_keys_are_read_or_refused_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert key_digests(None) == ()
    monkeypatch.setenv(VARIABLE, f"{KEY},{KEY}-2")
    digests = key_digests(None)
    assert len(digests) == 2 and opens(f"bearer {KEY}-2", digests) and not opens(KEY, digests) and not opens(None, digests)
    for text, word in (("", "holds no key"), ("secret\n", "16 or more"), (f"{KEY} {KEY}\n", "without spaces")):
        (tmp_path / "keys").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=word) as told:
            key_digests(str(tmp_path / "keys"))
        assert "secret" not in str(told.value) and KEY not in str(told.value)
    with pytest.raises(InputError, match="cannot be read"):
        key_digests(str(tmp_path / "nowhere"))
