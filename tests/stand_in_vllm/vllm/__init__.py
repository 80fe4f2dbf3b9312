"""Stands in for vLLM in a process of its own, where `tests/stand_in_vllm` is on PYTHONPATH: as much of it as `bench` uses.

It adds up tokens instead of decoding, drafts as `speculative_config` says and accepts a number of drafts that changes from step
to step. Environment variables say where it writes what it was asked, and what goes wrong: see `LLM`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

__all__ = ["LLM", "RequestOutputKind", "SamplingParams"]
__version__ = "0.32.0"
WATCHED = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING", "LD_PRELOAD")


def following(token: int) -> int:
    """The token after `token`, from 3 to 258."""
    return (token * 7 + 5) % 256 + 3


@dataclass
class Running:
    """A request and its answer so far."""

    id: str
    params: SamplingParams
    last: int
    tokens: list[int] = field(default_factory=list)


class LLM:
    """STAND_IN_SEEN: a file for what is asked; STAND_IN_REFUSES, STAND_IN_DIES, STAND_IN_DIFFERS: the way of drafting (`None`,
    `ngram`, `medusa`) that does not load, is killed at its third request, or ends its answers with another token."""

    def __init__(self, **settings: Any) -> None:
        self.llm_engine = self
        drafting = settings.get("speculative_config") or {}
        self.method, self.count = str(drafting.get("method")), int(drafting.get("num_speculative_tokens", 0))
        self.running: list[Running] = []
        self.most, self.requests, self.drafted, self.accepted = settings["max_num_seqs"], 0, 0, [0] * self.count
        self.note({"settings": settings, "environment": {name: os.environ.get(name) for name in WATCHED}})
        print("what a library prints is no answer")
        if os.environ.get("STAND_IN_REFUSES") == self.method:
            raise ValueError("Model architectures ['Tiny'] are not supported\nSupported: none")

    def note(self, values: dict[str, Any]) -> None:
        if "STAND_IN_SEEN" in os.environ:
            with open(os.environ["STAND_IN_SEEN"], "a", encoding="utf-8") as file:
                file.write(json.dumps({"method": self.method, **values}) + "\n")

    def add_request(self, id: str, prompt: dict[str, list[int]], params: SamplingParams) -> None:
        assert params.temperature == 0.0 and params.ignore_eos and params.output_kind is RequestOutputKind.DELTA
        self.requests += 1
        self.note({"prompt": prompt["prompt_token_ids"], "running": len(self.running) + 1})
        if os.environ.get("STAND_IN_DIES") == self.method and self.requests == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        self.running.append(Running(id, params, prompt["prompt_token_ids"][-1]))

    def step(self) -> list[Any]:
        time.sleep(0.002)
        outputs = []
        for one in self.running[:self.most]:
            before = len(one.tokens)
            accepted = (before % (self.count + 1)) if before else 0
            if before and self.count:
                self.drafted += self.count
                self.accepted = [count + (place < accepted) for place, count in enumerate(self.accepted)]
            done = False
            for _ in range(1 + accepted):
                one.last = following(one.last)
                differs = os.environ.get("STAND_IN_DIFFERS") == self.method and len(one.tokens) + 1 == one.params.max_tokens
                one.tokens.append(one.last if not differs else one.last ^ 1)
                done = one.last in one.params.stop_token_ids or len(one.tokens) == one.params.max_tokens
                if done:
                    break
            outputs.append(SimpleNamespace(request_id=one.id, finished=done,
                                           outputs=[SimpleNamespace(token_ids=one.tokens[before:])]))
        self.running = [one for one in self.running if not any(out.finished and out.request_id == one.id for out in outputs)]
        return outputs

    def get_metrics(self) -> list[Any]:
        if not self.count:
            return []
        return [SimpleNamespace(name="vllm:spec_decode_num_draft_tokens", value=float(self.drafted)),
                SimpleNamespace(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=list(self.accepted))]
