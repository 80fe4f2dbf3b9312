"""The Ray Data actors of `distill`: each holds one engine and writes its own part files."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hydra_core.base import Base, load_base, user_turn_opening
from hydra_core.decoding import Engine, Result, load_heads
from hydra_core.errors import InputError
from hydra_core.sampling import Request
from pipelines.config import BaseSection
from pipelines.profiling.cost_cache import machine_costs
from pipelines.rows.parquet_parts import write_part
from pipelines.rows.schemas import ERRORS, FEATURES, PROMPTS, RESPONSES, content_id, split_of
from pipelines.runtime.logs import speak

SHORTEST_PROMPT = 4  # tokens: less is a greeting cut short, not a request
FEATURE_TOKENS = 4096  # padded tokens in one feature forward


@dataclass(frozen=True)
class WorkerSettings:
    """What every distilling actor is given; plain values, so that Ray can ship them."""

    base: BaseSection
    cache: str
    folder: str
    threads: int
    max_batch_size: int
    rows_per_file: int
    max_new_tokens: int
    temperature: float
    held_out: float
    feature_dtype: str
    heads: str | None = None
    starts: tuple[str, ...] = ("",)

    def load(self) -> Base:
        speak()
        torch.set_num_threads(self.threads)
        return load_base(self.base.model, dtype=self.base.dtype, device=self.base.device, cache=Path(self.cache),
                         context_limit=self.base.context_limit)


def counts(**numbers: int) -> pa.Table:
    """One row of counts: what an actor hands back instead of the data it has already written."""
    return pa.table({name: [value] for name, value in numbers.items()})


class _Decoder:
    """An engine that decodes a block of requests and says how fast."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.base = settings.load()
        costs = partial(machine_costs, self.base, Path(settings.cache))
        self.drafter, self.trees = load_heads(settings.heads, self.base, costs) if settings.heads else (None, None)

    def engine(self, requests: list[Request]) -> Engine:
        """A running batch no larger than the work, and slots no longer than it can need."""
        longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        rows = min(self.settings.max_batch_size, len(requests))
        limit = min(longest, self.base.context_limit)
        return Engine(self.base, self.drafter, self.trees, max_batch_size=rows, context_limit=limit)

    def decode(self, requests: Iterable[Request], what: str) -> Iterator[Result]:
        wanted = list(requests)
        if not wanted:
            return
        engine, started, done, tokens = self.engine(wanted), time.perf_counter(), 0, 0
        said = started
        # longest prompts first: rows that start together end near each other, and prefill pads little
        for result in engine.stream(sorted(wanted, key=lambda r: -len(r.prompt_ids))):
            done, tokens = done + 1, tokens + len(result.token_ids)
            now = time.perf_counter()
            if now - said > 10 or done == len(wanted):
                said = now
                print(f"distill: {what} {done}/{len(wanted)} of this block, {tokens / (now - started):.0f} tokens/s",
                      file=sys.stderr, flush=True)
            yield result


class PromptWriter(_Decoder):
    """Samples user turns from the base itself: block rows are `index`, the seed of one candidate each."""

    def __call__(self, block: pa.Table) -> pa.Table:
        opening = tuple(user_turn_opening(self.base.tokenizer))
        requests = [Request(str(index), opening + self._start(index), self.settings.max_new_tokens,
                            self.settings.temperature, index) for index in block["index"].to_pylist()]
        rows, rejected = [], 0
        for result in self.decode(requests, "prompts"):
            row = self._row(result)
            rejected += row is None
            rows += [row] if row else []
        if rows:
            write_part(Path(self.settings.folder) / "candidates", rows, PROMPTS, key="source")
        return counts(ok=len(rows), rejected=rejected)

    def _start(self, index: int) -> tuple[int, ...]:
        """The tokens that candidate `index` begins with."""
        start = self.settings.starts[index % len(self.settings.starts)]
        return tuple(self.base.tokenizer(start, add_special_tokens=False).input_ids)

    def _row(self, result: Result) -> dict[str, Any] | None:
        """A prompt row, or None for a candidate that never ended, is too short, or is not text."""
        if result.finish_reason != "stop" or len(result.token_ids) <= SHORTEST_PROMPT:
            return None
        text = self.base.decode(self._start(int(result.id)) + result.token_ids).strip()
        if not text or "\ufffd" in text:
            return None
        prompt_id = content_id("chat", text)
        return {"prompt_id": prompt_id, "messages": None, "prompt": text, "source": f"self/{int(result.id):08d}",
                "prompt_ids": self.base.encode_prompt(text), "split": split_of(prompt_id, self.settings.held_out)}


class ResponseWriter(_Decoder):
    """Answers prompts: block rows are response rows without their answer."""

    def __call__(self, block: pa.Table) -> pa.Table:
        folder = Path(self.settings.folder)
        tasks = {row["id"]: row for row in block.to_pylist()}
        requests, errors, pending = [], [], []
        for row in tasks.values():
            request = Request(row["id"], tuple(row["prompt_ids"]), self.settings.max_new_tokens, row["temperature"],
                              row["seed"])
            try:
                request.check(self.base.vocab_size, self.base.context_limit)
                requests.append(request)
            except InputError as error:
                errors.append({"id": row["id"], "stage": "distill", "message": str(error)})
        done = tokens = 0
        for result in self.decode(requests, "answers"):
            pending.append({**tasks[result.id], "response_ids": result.token_ids, "finish_reason": result.finish_reason,
                            "base": str(self.base.identity)})
            done, tokens = done + 1, tokens + len(result.token_ids)
            if len(pending) == self.settings.rows_per_file:
                write_part(folder / "responses", pending, RESPONSES)
                pending = []
        if pending:
            write_part(folder / "responses", pending, RESPONSES)
        if errors:
            write_part(folder / "errors" / "answers", errors, ERRORS)
        return counts(ok=done, errors=len(errors), tokens=tokens)


class FeatureWriter:
    """Adds hidden states to response rows, and checks that they are the ones the answers came from."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.base = settings.load()

    def __call__(self, block: pa.Table) -> pa.Table:
        rows = sorted(block.to_pylist(), key=lambda row: len(row["prompt_ids"]) + len(row["response_ids"]))
        written: list[dict[str, Any]] = []
        agreed = compared = 0
        for group in _by_padded_size(rows):
            sequences = [row["prompt_ids"] + row["response_ids"] for row in group]
            for row, hidden in zip(group, self.base.hidden_states(sequences), strict=True):
                if row["temperature"] == 0:
                    same, total = self._greedy_agreement(row, hidden)
                    agreed, compared = agreed + same, compared + total
                written.append(self._feature_row(row, hidden))
        write_part(Path(self.settings.folder) / "features", written, FEATURES)
        print(f"distill: hidden states of {len(rows)} rows", file=sys.stderr, flush=True)
        return counts(ok=len(rows), agreed=agreed, compared=compared, bytes=sum(len(row["hidden"]) for row in written))

    def _greedy_agreement(self, row: dict[str, Any], hidden: torch.Tensor) -> tuple[int, int]:
        """Greedy tokens that `logits(hidden)` one position earlier reproduces: off by one, almost none would be."""
        prompt, answer = len(row["prompt_ids"]), torch.tensor(row["response_ids"], device=hidden.device)
        predicted = self.base.logits(hidden[prompt - 1:prompt - 1 + len(answer)]).argmax(-1)
        return int((predicted == answer).sum()), len(answer)

    def _feature_row(self, row: dict[str, Any], hidden: torch.Tensor) -> dict[str, Any]:
        kind = torch.bfloat16 if self.settings.feature_dtype == "bf16" else torch.float32
        values = hidden.to("cpu", kind).contiguous()
        raw = values.view(torch.int16 if kind == torch.bfloat16 else torch.int32).numpy()
        return {**row, "hidden": np.ascontiguousarray(raw).astype(raw.dtype.newbyteorder("<"), copy=False).tobytes(),
                "hidden_dtype": self.settings.feature_dtype, "hidden_tokens": hidden.shape[0],
                "hidden_width": hidden.shape[1], "hidden_layer": "last"}


def _by_padded_size(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Consecutive groups of length-sorted rows whose padded size stays in bounds."""
    group: list[dict[str, Any]] = []
    for row in rows:
        length = len(row["prompt_ids"]) + len(row["response_ids"])
        if group and length * (len(group) + 1) > FEATURE_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
