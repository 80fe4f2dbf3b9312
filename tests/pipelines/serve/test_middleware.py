"""What is turned away before it is read, and which keys open the endpoint."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hydra_core.errors import InputError
from pipelines.serve.api_keys import VARIABLE, key_digests, opens
from pipelines.serve.body_readers import PROMPT_SECONDS, BodyReaders
from pipelines.serve.middleware import Limits, RequestMiddleware
from pipelines.serve.openai.errors import ApiError

KEY = "0123456789abcdef-of-this-test"


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Any:
    def put(seconds: float = 5.0, most: int = 9, **changes: Any) -> list[tuple[str, int]]:
        counted: list[tuple[str, int]] = []
        monkeypatch.setattr(RequestMiddleware, "limits", Limits(BodyReaders(most, seconds, 10), **{
            "count": lambda route, status, seconds: counted.append((route, status)), **changes}))
        return counted
    monkeypatch.setattr(RequestMiddleware, "limits", None)
    return put


async def echo(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


JSON = ((b"content-type", b"application/json"),)


async def asked(parts: list[bytes], path: str = "/v1/completions", headers: tuple[tuple[bytes, bytes], ...] = JSON,
                ends: bool = True, method: str = "POST") -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body for a request whose body comes in `parts`; without `ends` the last never comes."""
    left = [{"type": "http.request", "body": part, "more_body": not ends or number < len(parts) - 1}
            for number, part in enumerate(parts)]
    sent: list[Any] = []

    async def receive() -> Any:
        if left:
            return left.pop(0)
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    await RequestMiddleware(echo)({"type": "http", "path": path, "headers": list(headers), "method": method}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


def ask(*args: Any, **settings: Any) -> tuple[int, bytes]:
    status, _, body = asyncio.run(asked(*args, **settings))
    return status, body


def test_nobody_is_let_in_before_the_limits_are_known(limits: Any) -> None:
    assert ask([b""])[0] == 503


def test_a_body_passes_whole_or_not_at_all(limits: Any) -> None:
    counted = limits()
    assert ask([b"0123", b"456789"]) == (200, b"0123456789")
    status, body = ask([b"0123", b"4567890"])
    assert status == 413 and json.loads(body)["error"]["code"] == "request_too_large"
    assert ask([b""], headers=(*JSON, (b"content-length", b"9" * 30)))[0] == 413
    assert ask([b"x"], path="/v1/completions/../x")[0] == 200
    assert counted == [("/v1/completions", 200), ("/v1/completions", 413), ("/v1/completions", 413), ("other", 200)]


def test_a_body_that_does_not_come_is_not_waited_for(limits: Any) -> None:
    limits(seconds=0.05)
    assert ask([b"0"], ends=False)[0] == 408


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/ready"), ("POST", "/health"), ("HEAD", "/"),
                                              ("GET", "/v1/models"), ("OPTIONS", "/v1/completions")])
def test_no_body_is_waited_for_where_none_is_needed(limits: Any, method: str, path: str) -> None:
    limits(seconds=3600.0)
    headers = ((b"content-length", b"10"),)

    async def soon() -> tuple[int, dict[bytes, bytes], bytes]:
        async with asyncio.timeout(30):
            return await asked([b"0"], path, headers, ends=False, method=method)

    status, _, body = asyncio.run(soon())
    assert (status, body) == (200, b"")


def test_only_some_bodies_are_read_at_once_and_slow_ones_give_way(limits: Any) -> None:
    limits(seconds=3600.0, most=2)

    async def crowd() -> tuple[list[int], int]:
        loop = asyncio.get_running_loop()
        clock, ahead = loop.time, 0.0
        loop.time = lambda: clock() + ahead  # type: ignore[method-assign]
        slow = [asyncio.create_task(asked([b"0"], ends=False)) for _ in range(2)]
        await asyncio.sleep(0)
        refused, headers, body = await asked([b"1"])
        assert json.loads(body)["error"]["code"] == "too_many_requests" and headers[b"Retry-After"] == b"1"
        ahead = PROMPT_SECONDS
        prompt = await asked([b"2"])
        async with asyncio.timeout(60):
            first = await slow[0]  # the oldest of them had to go
        slow[1].cancel()
        return [refused, prompt[0], first[0]], len(RequestMiddleware.limits.bodies._reading)  # type: ignore[union-attr]

    assert asyncio.run(crowd()) == ([503, 200, 408], 1)


def test_a_slow_body_whose_time_is_just_over_gives_way_once() -> None:
    async def crowd() -> tuple[bytes, list[object]]:
        readers = BodyReaders(1, 0.0, 99)

        async def never() -> dict[str, object]:
            await asyncio.sleep(3600)
            return {}

        async def whole() -> dict[str, object]:
            return {"type": "http.request", "body": b"1"}

        slow = asyncio.create_task(readers.read(None, never))
        while not readers._reading:
            await asyncio.sleep(0)
        ((number, (began, limit)),) = readers._reading.items()
        readers._reading[number] = began - PROMPT_SECONDS, limit
        while not limit.expired():
            await asyncio.sleep(0)
        readers.seconds = 60.0
        return await readers.read(None, whole), await asyncio.gather(slow, return_exceptions=True)

    found, (error,) = asyncio.run(crowd())
    assert found == b"1" and isinstance(error, ApiError) and error.status == 408


@pytest.mark.parametrize(("headers", "word"), [
    ((), "Content-Type: none"), (((b"content-type", b"text/plain"),), "Content-Type: text/plain"),
    (((b"content-type", b""),), "Content-Type: none"), ((*JSON, (b"content-encoding", b"gzip")), "Content-Encoding: gzip")])
def test_what_is_not_json_is_named(limits: Any, headers: Any, word: str) -> None:
    limits()
    status, body = ask([b"{}"], headers=headers)
    assert status == 415 and word in json.loads(body)["error"]["message"]
    assert ask([b"{}"], headers=((b"Content-Type", b"application/json; charset=utf-8"),))[0] == 200


def test_web_pages_of_other_origins_ask_where_that_is_set(limits: Any) -> None:
    page = ((b"origin", b"https://chat.example"), (b"access-control-request-method", b"POST"),
            (b"access-control-request-headers", b"authorization,content-type"))
    keyed = {"key_digests": ("0" * 64,)}
    limits(**keyed)
    assert asyncio.run(asked([b""], headers=page, method="OPTIONS"))[0] == 401
    limits(**keyed, origins=("https://chat.example",))
    status, headers, _ = asyncio.run(asked([b""], headers=page, method="OPTIONS"))
    assert status == 200 and headers[b"access-control-allow-origin"] == b"https://chat.example"
    assert b"authorization" in headers[b"access-control-allow-headers"].lower()
    status, headers, _ = asyncio.run(asked([b"{}"], headers=(*JSON, page[0])))
    assert status == 401 and headers[b"access-control-allow-origin"] == b"https://chat.example"  # so that the page can say why
    _, headers, _ = asyncio.run(asked([b"{}"], headers=(*JSON, (b"origin", b"https://evil.example"))))
    assert b"access-control-allow-origin" not in headers


def test_keys_open_all_but_probes(limits: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# one a line\n\n{KEY}\n", encoding="utf-8-sig")
    keys.chmod(0o600)
    limits(key_digests=key_digests(str(keys)))
    assert ask([b""])[0] == 401 and ask([b""], headers=(*JSON, (b"authorization", b"Bearer \xff")))[0] == 401
    assert ask([b""], headers=(*JSON, (b"Authorization", f"Bearer {KEY}".encode())))[0] == 200
    assert ask([b""], path="/health")[0] == ask([b""], path="/ready")[0] == 200
    limits(require_keys=True)  # none are there: nobody has one
    assert ask([b""], headers=(*JSON, (b"Authorization", f"Bearer {KEY}".encode())))[0] == 401
    limits()
    assert ask([b""])[0] == 200


def test_keys_are_read_or_refused_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert key_digests(None) == ()
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    for text, encoding in ((f"\ufeff{KEY}\n{KEY}-2\n", "utf-8"), (f"{KEY}\r\n\r\n{KEY}-2", "utf-8")):
        keys.write_text(text, encoding=encoding, newline="")
        digests = key_digests(str(keys))
        assert len(digests) == 2 and opens(f"bearer {KEY}-2", digests) and opens(f"Bearer {KEY}", digests)
    monkeypatch.setenv(VARIABLE, f"{KEY},{KEY}-2")
    assert key_digests(None) == digests and not opens(KEY, digests) and not opens(None, digests)
    for text, word in (("", "holds no key"), ("secret\n", "16 or more"), (f"{KEY} {KEY}\n", "without spaces")):
        keys.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=word) as told:
            key_digests(str(keys))
        assert "secret" not in str(told.value) and KEY not in str(told.value)
    with pytest.raises(InputError, match="cannot be read"):
        key_digests(str(tmp_path / "nowhere"))


def test_a_file_of_keys_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY, encoding="utf-8")
    for mode in (0o644, 0o640, 0o602):
        keys.chmod(mode)
        with pytest.raises(InputError, match=rf"others may read it \(mode {mode:o}\): run chmod 600 {keys}"):
            key_digests(str(keys))
    status = os.statvfs(keys)
    with monkeypatch.context() as mounted:  # a secret of Kubernetes, whose modes a user can neither choose nor change
        mounted.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=status.f_flag | os.ST_RDONLY))
        assert len(key_digests(str(keys))) == 1
    owner = keys.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)  # a mounted secret belongs to somebody else
    assert len(key_digests(str(keys))) == 1
