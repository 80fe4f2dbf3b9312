"""HTTP for threads over one aiohttp session: connections are reused, every request has a limit from its start to its end, and
redirects are not followed, since the API key would travel with them."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import threading
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

LONGEST_ANSWER = 64 << 20
"""Bytes; a longer answer is none."""
CONNECT_SECONDS, CLOSE_SECONDS = 30.0, 10.0


class NoAnswer(Exception):
    """The connection was refused, broken or cut off; `slow`: there was no end within the limit."""

    def __init__(self, why: str, slow: bool = False) -> None:
        super().__init__(why)
        self.slow = slow


@dataclass(frozen=True)
class HttpAnswer:
    """Status, headers (names in lower case) and the body's bytes."""

    status: int
    headers: dict[str, str]
    raw: bytes

    def value(self) -> Any:
        """The body as JSON. Raises ValueError for anything else, and for numbers that no JSON can hold."""
        try:
            return json.loads(self.raw, parse_constant=_refuse, parse_float=_finite)
        except RecursionError as error:
            raise ValueError(str(error)) from None


class HttpClient:
    """Requests to one address. `headers`: of every request; `close` ends those in flight, which raise NoAnswer."""

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        self.address = address.rstrip("/").removesuffix("/v1")  # with it, it is what OpenAI's clients call base_url
        self.headers = headers
        self._flying: set[Future[HttpAnswer]] = set()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        threading.Thread(target=self._loop.run_forever, name="http", daemon=True).start()

    def get(self, path: str, seconds: float) -> HttpAnswer:
        """Raises NoAnswer."""
        return self._run("GET", path, None, seconds)

    def post(self, path: str, body: dict[str, Any], seconds: float) -> HttpAnswer:
        """Raises NoAnswer, and ValueError for a body that is no JSON."""
        return self._run("POST", path, json.dumps(body).encode(), seconds)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for future in list(self._flying):
            future.cancel()
        with suppress(RuntimeError, TimeoutError):  # another thread closes it too, or a connection does not come to its end
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(CLOSE_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, method: str, path: str, body: bytes | None, seconds: float) -> HttpAnswer:
        future = asyncio.run_coroutine_threadsafe(self._ask(method, path, body, seconds), self._loop)
        self._flying.add(future)
        if self._closed:  # perhaps since the loop was looked at: nobody else would end the request
            future.cancel()
        try:
            return future.result()
        except CancelledError:
            raise NoAnswer("the job has ended") from None
        except aiohttp.ConnectionTimeoutError as error:
            raise NoAnswer(str(error)) from None
        except TimeoutError:
            raise NoAnswer(f"no end in {seconds:g} s", slow=True) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NoAnswer(f"{type(error).__name__}: {error}".splitlines()[0][:200]) from None
        finally:
            self._flying.discard(future)

    async def _ask(self, method: str, path: str, body: bytes | None, seconds: float) -> HttpAnswer:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=self.headers,
                                                  proxy=proxy_of(self.address))
        headers = {} if body is None else {"Content-Type": "application/json"}
        async with self._session.request(method, self.address + path, data=body, headers=headers, allow_redirects=False,
                                         timeout=aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS)) as answer:
            raw = bytearray()
            async for piece in answer.content.iter_any():
                raw += piece
                if len(raw) > LONGEST_ANSWER:
                    return HttpAnswer(500, {}, f"the answer is longer than {LONGEST_ANSWER >> 20} MiB".encode())
            return HttpAnswer(answer.status, {name.lower(): value for name, value in answer.headers.items()}, bytes(raw))

    async def _end(self) -> None:
        if self._session is not None:
            await self._session.close()


def proxy_of(address: str) -> str | None:
    """The proxy that the environment names for `address`; none for this machine, which no proxy reaches."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    if host == "localhost" or _is_loopback(host) or proxy_bypass(host):
        return None
    found = getproxies().get(parts.scheme)
    return f"http://{found}" if found and "://" not in found else found  # `proxy:3128`, as curl takes it


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        _refuse(text)
    return value
