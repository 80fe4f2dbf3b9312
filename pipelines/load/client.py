"""Timed streaming requests to an OpenAI-compatible endpoint: closed loop (fixed concurrency) or open loop (constant rate)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp

OK, REFUSED, FAILED, LOST = "ok", "refused", "failed", "lost"
NO_ANSWER = (ValueError, KeyError, TypeError, IndexError, AttributeError)
"""What reading an answer raises that is no JSON, or JSON of another shape."""


@dataclass(frozen=True)
class Sent:
    """One request. `outcome`: ok (a complete answer), refused (429), failed (any other status, or a broken stream), lost (no
    end in time); `at`: seconds since the first request; `first`: seconds to the first text; `gaps`: seconds between its pieces;
    `tokens`: of the answer, as the endpoint counts them; `why`: the reason for any other outcome than ok."""

    outcome: str
    at: float
    seconds: float
    first: float | None = None
    gaps: tuple[float, ...] = ()
    tokens: int = 0
    why: str = ""


@dataclass(frozen=True)
class Target:
    """The endpoint and the settings of requests. `patience`: seconds after which a request counts as lost."""

    address: str
    model: str
    max_new_tokens: int
    headers: dict[str, str]
    patience: float


async def closed_loop(target: Target, prompts: Sequence[str], requests: int, concurrency: int) -> list[Sent]:
    """Send `requests` requests in all and keep `concurrency` of them in flight."""
    left = iter(range(requests))
    found: list[Sent] = []

    async with _session(target) as session:
        started = time.perf_counter()

        async def worker() -> None:
            for number in left:
                found.append(await _ask(session, target, prompts[number % len(prompts)], started))

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return found


async def open_loop(target: Target, prompts: Sequence[str], rate: float, seconds: float,
                    sent: Callable[[], None]) -> list[Sent]:
    """Send a request every 1 / `rate` seconds for `seconds`, whether or not earlier ones have ended; then wait for all ends.

    `sent`: called after each request is sent.
    """
    async with _session(target) as session:
        started = time.perf_counter()
        tasks = []
        for number in range(max(1, round(rate * seconds))):
            await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(_ask(session, target, prompts[number % len(prompts)], started)))
            sent()
        return list(await asyncio.gather(*tasks))


def run(work: Coroutine[Any, Any, list[Sent]]) -> list[Sent]:
    return asyncio.run(work)


def _session(target: Target) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=target.headers,
                                 timeout=aiohttp.ClientTimeout(total=target.patience))


async def _ask(session: aiohttp.ClientSession, target: Target, prompt: str, zero: float) -> Sent:
    body = {"model": target.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": target.max_new_tokens,
            "temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    pieces: list[float] = []
    tokens, whole = 0, False
    try:
        async with session.post(f"{target.address.rstrip('/')}/v1/chat/completions", json=body,
                                allow_redirects=False) as answer:
            if answer.status != 200:
                text = (await answer.content.read(200)).decode(errors="replace")
                outcome = REFUSED if answer.status == 429 else FAILED
                return Sent(outcome, began - zero, time.perf_counter() - began, why=f"{answer.status}: {text}")
            async for line in answer.content:
                event = line.decode().removeprefix("data: ").strip()
                if event == "[DONE]":
                    whole = True
                elif event:
                    found = json.loads(event)
                    if "error" in found:
                        return Sent(FAILED, began - zero, time.perf_counter() - began, why=str(found["error"])[:200])
                    tokens = (found.get("usage") or {}).get("completion_tokens", tokens)
                    if found.get("choices"):
                        pieces.append(time.perf_counter())
    except TimeoutError:
        return Sent(LOST, began - zero, time.perf_counter() - began, why=f"no end in {target.patience:.0f} s")
    except (aiohttp.ClientError, OSError, *NO_ANSWER) as error:
        return Sent(FAILED, began - zero, time.perf_counter() - began, why=f"{type(error).__name__}: {error}"[:200])
    if not whole or not pieces:
        return Sent(FAILED, began - zero, time.perf_counter() - began, why="the stream ended early")
    gaps = tuple(later - earlier for earlier, later in pairwise(pieces))
    return Sent(OK, began - zero, time.perf_counter() - began, pieces[0] - began, gaps, tokens)
