"""The clients of a soak: those that wait for their answer, those that leave, bursts, and those whose bodies never come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from pipelines.load.client import NO_ANSWER, Target

OK, WRONG, REFUSED, TOLD, LEFT, FAILED, LOST = "answered", "wrong", "refused", "ended with an error", "left", "failed", "lost"
"""Outcomes of a request: the right answer; another one; a status that says why there is none; an error event in a stream that
had begun; the client left on purpose; anything else; no end in time."""
UNEXPECTED = (FAILED, LOST, WRONG)
"""Outcomes whose reasons are kept, those that are cited first in front."""
KEPT, LONGEST = 20, 300
"""Reasons that are kept of each outcome, and characters of each."""
REFUSALS = (408, 429, 503, 504)
LEAVING, STREAMED = 0.15, 0.6
"""Shares of the steady clients' requests."""
PAUSE = 0.25
"""Seconds for which a steady client that was refused stays away."""


@dataclass(frozen=True)
class Question:
    """A prompt, and the answer that plain decoding gives to it."""

    prompt: str
    max_tokens: int
    answer: str


@dataclass
class Tally:
    """Outcomes counted, and the first reasons of each that should not be."""

    counts: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, outcome: str, why: str = "") -> None:
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        kept = self.reasons.setdefault(outcome, [])
        if outcome in UNEXPECTED and len(kept) < KEPT:
            kept.append(f"{outcome}: {why}"[:LONGEST])

    @property
    def why(self) -> list[str]:
        return [reason for outcome in UNEXPECTED for reason in self.reasons.get(outcome, [])]


class Clients:
    """Sends requests to `target` and counts what becomes of them. `leave` draws who leaves, and when."""

    def __init__(self, target: Target, questions: list[Question], draws: random.Random) -> None:
        self.target, self.questions, self.draws, self.tally = target, questions, draws, Tally()
        self.flying: set[asyncio.Task[str]] = set()
        self.session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Clients:
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=self.target.headers,
                                             timeout=aiohttp.ClientTimeout(total=self.target.patience))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.flying:
            task.cancel()
        assert self.session is not None
        await self.session.close()

    def send(self, stream: bool, leave: float | None = None) -> asyncio.Task[str]:
        """Ask a question in the background; the task gives the outcome. `leave`: seconds after which the client leaves."""
        task = asyncio.create_task(self._one(self.draws.choice(self.questions), stream, leave))
        self.flying.add(task)
        task.add_done_callback(self.flying.discard)
        return task

    async def steady(self, over: asyncio.Event) -> None:
        """One request after the other until the event."""
        while not over.is_set():
            leave = self.draws.uniform(0, 0.5) if self.draws.random() < LEAVING else None
            if await self.send(self.draws.random() < STREAMED, leave) in (REFUSED, FAILED):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), PAUSE)

    async def silent(self, count: int, seconds: float) -> None:
        """Open `count` connections that announce a body and send none, hold them for `seconds`, and see that the endpoint
        answers others meanwhile. A connection that is refused counts as a request that failed."""
        held = []
        try:
            for number in range(count):
                try:
                    held.append(await self._silent_connection("GET /health" if number % 2 else "POST /v1/chat/completions"))
                except OSError as error:
                    self.tally.add(FAILED, f"a silent connection: {type(error).__name__}: {error}")
            await self.send(stream=False)
            await asyncio.sleep(seconds)  # how long such a client stays
        finally:
            for writer in held:
                writer.close()

    async def _silent_connection(self, what: str) -> asyncio.StreamWriter:
        """`what`: method and path. The key goes the way that other requests take: encrypted to an https address."""
        parts = urlsplit(self.target.address)
        secure = parts.scheme == "https"
        async with asyncio.timeout(self.target.patience):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if secure else 80), ssl=secure or None)
        method, path = what.split(" ")
        headers = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", "Content-Length": "10"}
        lines = [f"{name}: {value}" for name, value in (headers | self.target.headers).items()]
        writer.write("\r\n".join([f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", *lines, "", ""]).encode())
        return writer

    async def _one(self, question: Question, stream: bool, leave: float | None) -> str:
        try:
            async with asyncio.timeout(leave):
                outcome, why = await self._ask(question, stream)
        except TimeoutError:
            outcome, why = LOST if leave is None else LEFT, f"no end in {self.target.patience:.0f} s"
        except (aiohttp.ClientError, OSError, *NO_ANSWER) as error:
            outcome, why = FAILED, f"{type(error).__name__}: {error}"
        self.tally.add(outcome, why)
        return outcome

    async def _ask(self, question: Question, stream: bool) -> tuple[str, str]:
        found = await self.answer(question.prompt, question.max_tokens, stream)
        if isinstance(found, tuple):
            return found
        return (OK, "") if found == question.answer else (WRONG, f"{question.prompt!r}: {found!r} is not {question.answer!r}")

    async def answer(self, prompt: str, max_tokens: int, stream: bool = False, **more: Any) -> str | tuple[str, str]:
        """The greedy answer to `prompt`, or the outcome and the reason why there is none. `more`: further fields."""
        assert self.session is not None
        body = {"model": self.target.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens,
                "temperature": 0.0, "stream": stream, **more}
        async with self.session.post(f"{self.target.address.rstrip('/')}/v1/chat/completions", json=body,
                                     allow_redirects=False) as answer:
            if answer.status != 200:
                text = (await answer.content.read(200)).decode(errors="replace")
                return REFUSED if answer.status in REFUSALS else FAILED, f"{answer.status}: {text}"
            if not stream:
                return str((await answer.json())["choices"][0]["message"]["content"])
            pieces: list[str] = []
            async for line in answer.content:
                event = line.decode().removeprefix("data: ").strip()
                if event == "[DONE]":
                    return "".join(pieces)
                if event:
                    found = json.loads(event)
                    if "error" in found:
                        return TOLD, str(found["error"])
                    pieces += [choice["delta"].get("content") or "" for choice in found["choices"]]
            return FAILED, "the stream ended early"
