"""`load --soak`: minutes of load during which replicas are killed, heads are swapped, and clients leave, burst or stay silent.

    RUN/soak/report.json, report.md

It holds that every request ends in an answer or a clear refusal, that answers are those of plain decoding, that memory stays
flat, and that nothing is left in flight at the end. An endpoint given by address gets the clients alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from hydra_core.errors import InputError, StoppedError
from pipelines.config import RunConfig
from pipelines.load.client import NO_ANSWER, Target
from pipelines.load.soak_chaos import LEAST_MINUTES, Chaos, Memory
from pipelines.load.soak_clients import FAILED, LOST, OK, REFUSED, WRONG, Clients, Question
from pipelines.runtime.artifacts import RunPaths, StageResult
from pipelines.runtime.console import Progress, say
from pipelines.runtime.files import remove_tree, write_text
from pipelines.runtime.tables import Table
from pipelines.tracking import Tracker

STAGE = "load"
EXACT, FLAT = "answers are those of plain decoding", "memory is flat"
DISTURBED = "replicas were killed and heads swapped"
SAMPLE_SECONDS = 5.0
SILENT = 20
"""Connections at a time whose bodies never come."""
READY_SECONDS = 120.0
"""In which all replicas must be there again at the end."""
PROMISED = 0.5
"""Share of the clients' patience within which an application that is soaked ends each request."""
IDLE = ("accepted", "running", "in_flight")
"""What `/ready` counts, and must count as none at the end: answers at the front, in the engines and at the replicas."""
CITED = 3
"""Processes that a check names; the report has all."""


@dataclass(frozen=True)
class Soaked:
    """What is soaked. `slots`: answers that it makes at once; `room`: that it accepts at once; `exact`: fp32, where answers are
    equal token for token; `chaos`: None for an endpoint given by address."""

    target: Target
    label: str
    slots: int
    room: int
    replicas: int
    exact: bool
    chaos: Chaos | None


@dataclass
class Report:
    """The figures of a soak. `checks`: what it holds -> the reason why that is not so, empty where it is; `unjudged`: of those
    that hold because nothing could be looked at, why."""

    seed: int
    label: str
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    unjudged: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def failed(self) -> dict[str, str]:
        return {name: why for name, why in self.checks.items() if why}


def run_soak(config: RunConfig, endpoint: Soaked, prompts: list[str], seed: int) -> StageResult:
    """Soak `endpoint`, write the report, and show it. Raises StoppedError, which names them, when checks fail."""
    section, folder = config.load, soak_folder(config)
    say(STAGE, f"soaking {endpoint.label} for {section.soak_minutes:g} minutes, load.soak_seed={seed}")
    report = Report(seed, endpoint.label)
    with Tracker.open(config).start(STAGE, params={"soak": {"seed": seed, "minutes": section.soak_minutes}}) as tracked:
        try:
            asyncio.run(_soak(endpoint, prompts, random.Random(seed), 60 * section.soak_minutes, section, report))
        except KeyboardInterrupt:
            report.interrupted = True
            raise
        finally:
            write_text(folder / "report.json", json.dumps(vars(report), indent=2))
            write_text(folder / "report.md", markdown(report))
            for name in ("report.json", "report.md"):
                tracked.log_artifact(folder / name)
        for table in tables(report):
            table.show()
        figures = {"label": report.label, "seed": seed, "seconds": report.seconds, **report.outcomes, **report.events}
        tracked.describe(f"{report.label}: {'; '.join(report.failed) or 'every check holds'}", markdown(report))
        tracked.log_metrics({f"soak.{name}": value for name, value in figures.items() if isinstance(value, (int, float))})
    if report.failed:
        raise StoppedError(f"load.soak: {'; '.join(f'{name}: {why}' for name, why in report.failed.items())} "
                           f"(load.soak_seed={seed}, {folder / 'report.md'})")
    return StageResult(STAGE, tracked.run_id, {"report": str(folder / "report.md")}, figures)


def soak_folder(config: RunConfig) -> Path:
    return RunPaths.of(config).run / "soak"


async def _soak(endpoint: Soaked, prompts: list[str], draws: random.Random, seconds: float, section: Any,
                report: Report) -> None:
    started = time.monotonic()
    async with Clients(endpoint.target, [], draws) as clients:
        clients.questions += await _questions(clients, prompts, draws, section.max_new_tokens)
        over, memory = asyncio.Event(), Memory()
        tasks = [asyncio.create_task(clients.steady(over)) for _ in range(2 * endpoint.slots)]
        tasks += _disturbances(endpoint, clients, draws, seconds, over, memory, started)
        try:
            with Progress(STAGE, "seconds of soak", total=round(seconds)) as progress:
                for _ in range(round(seconds)):
                    await asyncio.sleep(1.0)  # how long a soak lasts
                    progress.advance()
            over.set()
            for done in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(done, BaseException):
                    report.checks["the soak itself goes through"] = f"{type(done).__name__}: {done}"[:200]
            await asyncio.gather(*clients.flying)
            left = await _left_behind(endpoint, clients)
        finally:
            for task in tasks:
                task.cancel()
            report.seconds = round(time.monotonic() - started, 1)
            report.outcomes, report.why = dict(sorted(clients.tally.counts.items())), clients.tally.why
            report.events |= endpoint.chaos.events if endpoint.chaos else {}
            report.memory = memory.rows()
    report.checks |= judge(endpoint, report, section.soak_growth, left)
    report.unjudged = unjudged(endpoint, report)


def _disturbances(endpoint: Soaked, clients: Clients, draws: random.Random, seconds: float, over: asyncio.Event,
                  memory: Memory, started: float) -> list[asyncio.Task[None]]:
    """What happens at random moments until `over`."""
    async def every(mean: float, what: Callable[[], Awaitable[object]], least: float = 0.0) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), least + draws.expovariate(1 / mean))
            if over.is_set():
                return
            await what()

    async def burst() -> None:
        count = draws.randint(endpoint.room // 2, round(1.5 * endpoint.room))
        await asyncio.gather(*(clients.send(draws.random() < 0.5) for _ in range(count)))

    async def silent() -> None:
        await clients.silent(SILENT, min(20.0, seconds / 6))

    scale = min(1.0, seconds / 300)
    found = [every(30 * scale, burst), every(30 * scale, silent)]
    if (chaos := endpoint.chaos) is not None:
        async def kill() -> None:
            if time.monotonic() - started > seconds / 4:
                await asyncio.to_thread(chaos.keep_one)
            await asyncio.to_thread(chaos.kill)

        async def watch() -> None:
            await asyncio.to_thread(memory.sample, time.monotonic() - started, chaos.args.app_name)

        found += [every(40 * scale, kill, 20 * scale), every(40 * scale, lambda: asyncio.to_thread(chaos.swap), 10 * scale),
                  every(0.01, watch, SAMPLE_SECONDS * scale)]
    return [asyncio.create_task(work) for work in found]


async def _questions(clients: Clients, prompts: list[str], draws: random.Random, most: int) -> list[Question]:
    """Each prompt with a length of its own and plain decoding's answer, asked for before anything happens to the endpoint."""
    found = []
    for prompt in prompts:
        length = draws.randint(max(1, most // 4), most)
        answer = await clients.answer(prompt, length, speculative="off")
        if isinstance(answer, tuple) and "speculative" in answer[1]:  # an endpoint of another kind
            answer = await clients.answer(prompt, length)
        if isinstance(answer, tuple):
            raise InputError(f"load: {clients.target.address} does not answer: {answer[0]} ({answer[1]})")
        found.append(Question(prompt, length, answer))
    return found


async def _left_behind(endpoint: Soaked, clients: Clients) -> str:
    """What is not as it was before, after a while; empty where all is."""
    assert clients.session is not None
    why, deadline = "no answer", time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        with suppress(aiohttp.ClientError, OSError, *NO_ANSWER):
            async with clients.session.get(f"{endpoint.target.address.rstrip('/')}/ready") as answer:
                if endpoint.chaos is None and answer.status in (200, 404):  # 404: an endpoint of another kind
                    return ""
                info = await answer.json() if answer.status == 200 else {}
                found = {name: info.get(name) for name in ("replicas", *IDLE)}
                if found == {"replicas": endpoint.replicas} | dict.fromkeys(IDLE, 0):
                    return ""
                why = f"/ready says {answer.status}, {found}"[:200]
        await asyncio.sleep(0.5)  # between two looks
    return f"{why}, not {endpoint.replicas} replicas with nothing in flight, {READY_SECONDS:.0f} s after the end"


def judge(endpoint: Soaked, report: Report, growth: float, left: str) -> dict[str, str]:
    """Every check with the reason why it fails, empty where it holds. `growth`: MiB a minute that a process may grow by."""
    counts = report.outcomes
    lost = ", ".join(f"{counts[name]} {name}" for name in (FAILED, LOST) if counts.get(name))
    cited = next((why for why in report.why if why.startswith((FAILED, LOST))), "-")
    fast = [f"{row['role']} {row['pid']:.0f} grows by {row['mib_per_minute']} MiB a minute" for row in report.memory
            if row["mib_per_minute"] is not None and row["mib_per_minute"] > growth]
    if len(fast) > CITED:
        fast[CITED:] = [f"{len(fast) - CITED} more"]
    return {
        "every request ends in an answer or a clear refusal": f"{lost}, such as {cited}" if lost else "",
        EXACT: f"{counts[WRONG]} differ" if endpoint.exact and counts.get(WRONG) else "",
        "requests are answered": "" if counts.get(OK, 0) > counts.get(REFUSED, 0) / 10 else f"{counts.get(OK, 0)} answers",
        FLAT: "; ".join(fast),
        "nothing is left behind": left,
        DISTURBED: "" if endpoint.chaos is None or (
            report.events.get("kills") and report.events.get("swaps")) else f"{report.events}"}


def unjudged(endpoint: Soaked, report: Report) -> dict[str, str]:
    """The checks that nothing was there to judge by, and why."""
    found = {}
    if all(row["mib_per_minute"] is None for row in report.memory):
        found[FLAT] = (f"memory not judged: no process was watched for {LEAST_MINUTES:g} minutes after it had settled"
                       if endpoint.chaos else "memory not judged: the endpoint's processes are not watched from here")
    if not endpoint.exact:
        found[EXACT] = "not judged: only fp32 gives equal tokens in batches of any size"
    if endpoint.chaos is None:
        found[DISTURBED] = "not judged: an endpoint given by address gets the clients alone"
    return found


def tables(report: Report) -> list[Table]:
    """Outcomes and events, the memory of each process, and the checks."""
    counts = [(name, str(count)) for name, count in (*report.outcomes.items(), *report.events.items())]
    memory = [(str(row["role"]), f"{row['pid']:.0f}", f"{row['minutes']:.1f}", f"{row['first_mib']:.0f}",
               f"{row['last_mib']:.0f}", "-" if row["mib_per_minute"] is None else f"{row['mib_per_minute']:+.2f}")
              for row in report.memory]
    title = f"Soak of {report.label}: {report.seconds:.0f} s, seed {report.seed}"
    return [Table(("requests and events", "count"), counts, title),
            Table(("process", "id", "minutes judged", "MiB first", "MiB last", "MiB a minute"), memory, "Memory"),
            Table(("check", "result"), [
                (name, why or report.unjudged.get(name, "holds")) for name, why in report.checks.items()], "Checks")]


def markdown(report: Report) -> str:
    """The same tables as a page."""
    parts = [f"# Soak: {report.label}\n\n{report.seconds:.0f} s, seed {report.seed}"
             + (", interrupted" if report.interrupted else "") + ".\n"]
    return "\n".join([*parts, *(table.markdown() for table in tables(report))])


def soak_args(config: RunConfig) -> RunConfig:
    """The settings of the application that a soak starts: two replicas at least, since it kills them, and a limit well below the
    clients' patience, so that what waits in a long queue on a slow machine is refused in time and not taken for lost."""
    limit = min(config.load.patience * PROMISED, config.serve.request_seconds or config.load.patience)
    changes = {"replicas": max(2, config.serve.replicas), "request_seconds": limit}
    return config.model_copy(update={"serve": config.serve.model_copy(update=changes)})


def chaos_folder(config: RunConfig) -> Path:
    """An empty place for the configuration that is swapped in."""
    folder = soak_folder(config) / "ngram"
    remove_tree(folder)
    return folder
