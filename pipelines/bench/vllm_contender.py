"""vLLM as a contender of `bench`: each way of decoding in a process of its own, which reads the same token ids, decodes greedily,
stops at the same tokens and counts them as the other contenders do.

Times are taken in that process, around each step of vLLM's engine: what the pipe takes counts for nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra_core.base import Base
from hydra_core.errors import StoppedError
from hydra_core.sampling import Request
from hydra_core.storage import as_path, is_remote
from pipelines.bench.plan import LIMITS, BenchPlan, Outcome, Question, heads_name, room_for
from pipelines.bench.questions import room_for_turns
from pipelines.bench.vllm_setup import command, find_environment, vllm_environment, vllm_settings
from pipelines.runtime.console import say

FOLDER = "vllm"
"""Beside the rows: what vLLM wrote, a file for each contender, and the exported heads."""
DRAFT_TOKENS = 64
SECONDS = 20
"""In which a process ends by itself when nothing more is asked of it."""


class VllmProcess:
    """A vLLM that stays until `close`. `settings`: the first line that it reads, see `vllm_process`; `log`: where its own lines
    go.

    Raises StoppedError, in one line, where vLLM does not start, and where it ends before its answer.
    """

    def __init__(self, method: str, words: Sequence[str], settings: Mapping[str, Any], environment: Mapping[str, str],
                 log: Path) -> None:
        self.method, self.log = method, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as lines:
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=lines, text=True,
                                            env=environment, start_new_session=True)
        try:
            self.version = str(self.ask(settings)["version"])
        except BaseException:
            self.close()
            raise

    def ask(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to one line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, which the next line tells
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"error": self._end()}
        if "error" in found:
            raise StoppedError(f"bench: {self.method}: vLLM stopped ({found['error']}): see {self.log}, or leave it out of "
                               "bench.methods")
        return found

    def _end(self) -> str:
        """How the process ended, and the last line that it wrote."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS)
        code = self.process.poll()
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with {code}"
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return how + (f", {lines[-1][:200]}" if lines else "")

    def close(self) -> None:
        """End it, and the processes that vLLM itself has started."""
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class VllmPool:
    """The vLLM processes of a bench, each started when it is first asked for; they end with the block. `questions`: all that may
    be asked; `dtype`: the weight format, by default that of the run."""

    def __init__(self, plan: BenchPlan, questions: Sequence[Question], dtype: str | None = None) -> None:
        self.plan, self.questions = plan, questions
        self.label = "" if dtype is None else f"-{dtype}"
        self.processes: dict[str, VllmProcess] = {}
        self._stack = ExitStack()

    def __enter__(self) -> VllmPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def process(self, method: str, base: Base) -> VllmProcess:
        """The process of a contender, with room for every question and for as many requests at once as the plan has."""
        if method not in self.processes:
            heads = heads_name(method, self.plan.heads) is not None
            found, folder = find_environment(self.plan.vllm_python, method, heads), self._folder()
            room, rows = _room(self.plan, base, self.questions), _rows(self.plan)
            settings = {"llm": vllm_settings(method, self.plan, base, room, rows, folder), "stop_ids": list(base.stop_ids)}
            say("bench", f"{method}{self.label}: vLLM starts")
            process = VllmProcess(method, command(found.python), settings,
                                  vllm_environment(found, self.plan.threads, base.device.type == "cpu"),
                                  folder / f"{method}{self.label}.log")
            self._stack.callback(process.close)
            self.processes[method] = process
        return self.processes[method]

    def answer(self, method: str, base: Base, requests: Sequence[Request], level: int) -> dict[str, Any]:
        """See `vllm_process.answer_job`."""
        return self.process(method, base).ask({
            "requests": [[list(request.prompt_ids), request.max_new_tokens] for request in requests], "level": level})

    def alone(self, method: str, base: Base, prompt_ids: tuple[int, ...], max_new_tokens: int) -> Outcome:
        """One request."""
        return outcome_of(self.answer(method, base, [Request(method, prompt_ids, max_new_tokens)], 1))

    def batch(self, method: str, base: Base, requests: Sequence[Request]) -> int:
        """All requests, `plan.max_batch_size` at once; the number of tokens."""
        return sum(map(len, self.answer(method, base, requests, self.plan.max_batch_size)["tokens"]))

    def _folder(self) -> Path:
        """On this machine, as vLLM reads heads from there: the run's own, or a temporary one where that is in an object store."""
        folder = as_path(self.plan.rows_file).parent / FOLDER
        if not is_remote(folder):
            return folder
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory()))


def outcome_of(answer: Mapping[str, Any]) -> Outcome:
    """The answer to a single request. The first token is that of the first step; every later step verified what was drafted."""
    events, (tokens,) = answer["events"], answer["tokens"]
    first, last, steps = events[0][0], events[-1][0], len(events) - 1
    at_least = [steps, *(count for count in answer["accepted"] if count)]  # the counts fall with the position
    lengths = [count - more for count, more in zip(at_least, [*at_least[1:], 0], strict=True)]
    return Outcome(token_ids=tuple(tokens), steps=steps, drafted=answer["drafted"], accepted=sum(answer["accepted"]),
                   prefill_seconds=first - answer["sent"][0], decode_seconds=last - first,
                   accepted_lengths=tuple(lengths))


def _room(plan: BenchPlan, base: Base, questions: Sequence[Question]) -> int:
    """Tokens of prompt and answer of the longest request, in whichever part of the bench, and of drafts after them: where a
    sequence nears its limit vLLM drafts less."""
    longest = max(plan.max_new_tokens, LIMITS[1]) if plan.batch_prompts else plan.max_new_tokens
    asked = max(room_for_turns(base, plan.max_new_tokens, questions), room_for(base, longest, questions))
    return min(base.context_limit, asked + DRAFT_TOKENS)


def _rows(plan: BenchPlan) -> int:
    """Most requests at once."""
    return max(1, plan.identity_batch if plan.identity_prompts else 1, plan.max_batch_size if plan.batch_prompts else 1,
               *plan.concurrency)
