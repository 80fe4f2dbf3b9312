"""The Ray Data actors of `distill`: each loads the base once and writes its own part files."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hydra_core.base import Base, user_turn_opening
from hydra_core.decoding import Engine, Result, load_heads
from hydra_core.errors import InputError
from hydra_core.sampling import Request
from pipelines.config import BaseSection
from pipelines.profiling.cost_cache import machine_costs
from pipelines.rows.parquet_parts import write_part
from pipelines.rows.schemas import ERRORS, FEATURES, PROMPTS, RESPONSES, content_id, split_of
from pipelines.runtime.console import Progress
from pipelines.runtime.logs import speak

SHORTEST_PROMPT = 4  # in tokens: a shorter one is a fragment of a greeting, not a request
FEATURE_TOKENS = 4096  # padded tokens in one forward that computes hidden states
FEATURE_ROWS = 128  # rows of one part of features


@dataclass(frozen=True)
class WorkerSettings:
    """What every actor of `distill` receives; plain values, since Ray serialises them.

    `features`: rows whose hidden states are stored, "all" or "held_out"; `starts`: texts that self-made prompts begin with.
    """

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
    features: str
    heads: str | None = None
    starts: tuple[str, ...] = ("",)

    def load(self) -> Base:
        """Load the base in this process."""
        speak()
        torch.set_num_threads(self.threads)
        return self.base.load(self.cache)


def counts(**numbers: int) -> pa.Table:
    """One row of counts: what an actor returns, as it has written the rows themselves."""
    return pa.table({name: [value] for name, value in numbers.items()})


class _Decoder:
    """Decodes blocks of requests, with lines of progress on stderr."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.base = settings.load()
        costs = partial(machine_costs, self.base, Path(settings.cache))
        self.drafter, self.trees = load_heads(settings.heads, self.base, costs) if settings.heads else (None, None)

    def engine(self, requests: list[Request]) -> Engine:
        """An engine whose batch is no larger than the number of requests, with a cache no longer than they can need."""
        longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        rows = min(self.settings.max_batch_size, len(requests))
        limit = min(longest, self.base.context_limit)
        return Engine(self.base, self.drafter, self.trees, max_batch_size=rows, context_limit=limit)

    def decode(self, requests: Iterable[Request], what: str) -> Iterator[Result]:
        """Results in the order in which they finish; `what`: their name in lines of progress."""
        wanted = list(requests)
        if not wanted:
            return
        engine, started, tokens = self.engine(wanted), time.perf_counter(), 0
        with Progress("distill", f"{what} of a block", len(wanted)) as progress:
            # longest prompts first: sequences that start together end at about the same step, and prefill has little padding
            for result in engine.stream(sorted(wanted, key=lambda r: -len(r.prompt_ids))):
                tokens += len(result.token_ids)
                progress.advance(1, f"{tokens / (time.perf_counter() - started):.0f} tokens/s")
                yield result


class PromptWriter(_Decoder):
    """Samples user turns from the base itself. Rows of a block: `index`, the seed of one candidate."""

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
        """A prompt row, or None for a candidate that did not end, is too short, or is not text."""
        if result.finish_reason != "stop" or len(result.token_ids) <= SHORTEST_PROMPT:
            return None
        text = self.base.decode(self._start(int(result.id)) + result.token_ids).strip()
        if not text or "\ufffd" in text:
            return None
        prompt_id = content_id("chat", text)
        return {"prompt_id": prompt_id, "messages": None, "prompt": text, "source": f"self/{int(result.id):08d}",
                "prompt_ids": self.base.encode_prompt(text), "split": split_of(prompt_id, self.settings.held_out)}


class FeatureWriter:
    """Adds hidden states to response rows, and checks that the answers follow from them. Rows of a block: response rows."""

    def __init__(self, settings: WorkerSettings, base: Base | None = None) -> None:
        self.settings = settings
        self.base = base or settings.load()

    def __call__(self, block: pa.Table) -> pa.Table:
        return counts(ok=len(block), **self.write(block.to_pylist()))

    def write(self, rows: list[dict[str, Any]]) -> dict[str, int]:
        """Write parts of at most `FEATURE_ROWS` rows; returns how many rows, greedy tokens compared, and those that agreed."""
        agreed = compared = 0
        for start in range(0, len(rows), FEATURE_ROWS):
            part = sorted(rows[start:start + FEATURE_ROWS], key=lambda row: len(row["prompt_ids"]) + len(row["response_ids"]))
            written: list[dict[str, Any]] = []
            for group in _by_padded_size(part):
                sequences = [row["prompt_ids"] + row["response_ids"] for row in group]
                for row, hidden in zip(group, self.base.hidden_states(sequences), strict=True):
                    if row["temperature"] == 0:
                        same, total = self._greedy_agreement(row, hidden)
                        agreed, compared = agreed + same, compared + total
                    written.append(self._feature_row(row, hidden))
            write_part(Path(self.settings.folder) / "features", written, FEATURES)
        return {"features": len(rows), "agreed": agreed, "compared": compared}

    def _greedy_agreement(self, row: dict[str, Any], hidden: torch.Tensor) -> tuple[int, int]:
        """Greedy tokens that are the argmax of `logits(hidden)` one position earlier, and all greedy tokens of the row.

        With hidden states that are off by one position, almost none would be.
        """
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


class ResponseWriter(_Decoder):
    """Answers prompts and computes the hidden states of the answers.

    Rows of a block: response rows without their answer, and `has_features`: whether their hidden states are stored already.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        super().__init__(settings)
        self.features = FeatureWriter(settings, self.base)

    def __call__(self, block: pa.Table) -> pa.Table:
        folder = Path(self.settings.folder)
        tasks = {row["id"]: row for row in block.to_pylist()}
        stored = {name for name, row in tasks.items() if row.pop("has_features")}
        requests, errors = self._requests(tasks.values())
        answered: list[dict[str, Any]] = []
        written = 0
        for result in self.decode(requests, "answers"):
            answered.append({**tasks[result.id], "response_ids": list(result.token_ids), "finish_reason": result.finish_reason,
                             "base": str(self.base.identity)})
            if len(answered) - written == self.settings.rows_per_file:
                write_part(folder / "responses", answered[written:], RESPONSES)
                written = len(answered)
        if len(answered) > written:
            write_part(folder / "responses", answered[written:], RESPONSES)
        if errors:
            write_part(folder / "errors" / "answers", errors, ERRORS)
        # after the block, when the engine and its cache are gone: the worker holds one large thing at a time
        kept = [row for row in answered if row["id"] not in stored
                and (self.settings.features == "all" or row["split"] == "held_out")]
        return counts(ok=len(answered), errors=len(errors), **self.features.write(kept))

    def _requests(self, rows: Iterable[dict[str, Any]]) -> tuple[list[Request], list[dict[str, Any]]]:
        """Requests, and error rows for prompts that the base cannot answer."""
        requests, errors = [], []
        for row in rows:
            request = Request(row["id"], tuple(row["prompt_ids"]), self.settings.max_new_tokens, row["temperature"],
                              row["seed"])
            try:
                request.check(self.base.vocab_size, self.base.context_limit)
                requests.append(request)
            except InputError as error:
                errors.append({"id": row["id"], "stage": "distill", "message": str(error)})
        return requests, errors


def _by_padded_size(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Consecutive groups of rows, sorted by length, whose padded size is at most `FEATURE_TOKENS`."""
    group: list[dict[str, Any]] = []
    for row in rows:
        length = len(row["prompt_ids"]) + len(row["response_ids"])
        if group and length * (len(group) + 1) > FEATURE_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
