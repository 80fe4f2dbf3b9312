"""The actors of `distill`: each loads the base once, and hands on the rows that it makes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hydra_core.base import Base, TextBase, load_vocabulary, user_turn_opening
from hydra_core.decoding import Engine, RequestEngine, Result, load_heads
from hydra_core.errors import InputError, StoppedError
from hydra_core.interop import VllmEngine, VllmSettings, export_once, speculative_of
from hydra_core.sampling import Request
from pipelines.config import BaseSection
from pipelines.distill.tasks import ANSWERED, rows_of
from pipelines.profiling.cost_cache import machine_costs
from pipelines.rows.schemas import content_id, is_in_share, split_of
from pipelines.runtime.console import Progress
from pipelines.runtime.faults import first_line
from pipelines.runtime.logs import speak
from pipelines.runtime.row_flow import Rows, in_order

SHORTEST_PROMPT = 4  # in tokens: a shorter one is a fragment of a greeting, not a request
FEATURE_TOKENS = 4096  # padded tokens in one forward that computes hidden states
FEATURE_ROWS = 128  # most rows of one part of features
FEATURE_BYTES = 64 << 20  # of hidden states in one part, unless one row has more
VALUE_BYTES = {"bf16": 2, "fp32": 4}
CLOSE = {"fp32": 1e-3, "bf16": 0.2, "int4": 0.2}
"""How far a recorded hidden state may be from that of a second forward, as a share of its length; one that is off by a position
is about as far as it is long."""
Recorded = tuple[dict[str, Any], torch.Tensor | None]
"""A response row and the hidden states that decoding gave, where they are stored."""


@dataclass(frozen=True)
class WorkerSettings:
    """What every actor of `distill` receives; plain values, since Ray serialises them.

    `features`: rows whose hidden states are stored, "all" or "held_out"; `check_share`: of these rows, those that are computed
    a second time; `width`: of a hidden state; `starts`: texts that self-made prompts begin with; `vllm`: how vLLM runs the base,
    None: our own engine does.
    """

    base: BaseSection
    cache: str
    threads: int
    max_batch_size: int
    rows_per_file: int
    max_new_tokens: int
    temperature: float
    held_out: float
    feature_dtype: str
    features: str
    check_share: float
    width: int
    heads: str | None = None
    starts: tuple[str, ...] = ("",)
    vllm: VllmSettings | None = None

    def load(self) -> Base:
        """Load the base in this process."""
        speak()
        torch.set_num_threads(self.threads)
        return self.base.load(self.cache)


    def start_vllm(self) -> VllmEngine:
        """Start vLLM in this process, with the heads where there are some."""
        speak()
        assert self.vllm is not None
        cache, speculative = Path(self.cache), None
        if self.heads:
            vocabulary = load_vocabulary(self.base.model, dtype=self.base.dtype, cache=cache)
            speculative = speculative_of(export_once(self.heads, vocabulary, cache), self.vllm.num_speculative_tokens)
        texts = self.base.load_weightless(cache)
        return VllmEngine(texts, self.vllm, max_batch_size=self.max_batch_size, speculative=speculative)


class _Decoder:
    """Decodes blocks of requests, with lines of progress on stderr. `texts`: the base, without weights where vLLM has them."""

    base: Base
    texts: TextBase
    vllm: VllmEngine | None = None

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        if settings.vllm is not None:
            self.vllm = settings.start_vllm()
            self.texts = self.vllm.base
            return
        self.texts = self.base = settings.load()
        costs = partial(machine_costs, self.base, Path(settings.cache))
        self.drafter, self.trees = load_heads(settings.heads, self.base, costs) if settings.heads else (None, None)

    def engine(self, requests: list[Request]) -> RequestEngine:
        """vLLM, or an engine whose batch is no larger than the number of requests, with a cache no longer than they can need."""
        if self.vllm is not None:
            return self.vllm
        longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
        rows = min(self.settings.max_batch_size, len(requests))
        limit = min(longest, self.base.context_limit)
        return Engine(self.base, self.drafter, self.trees, max_batch_size=rows, context_limit=limit)

    def decode(self, requests: Iterable[Request], what: str) -> Iterator[Result]:
        """Results in the order in which they finish; `what`: their name in lines of progress. Raises StoppedError where vLLM
        fails."""
        wanted = list(requests)
        if not wanted:
            return
        engine, started, tokens = self.engine(wanted), time.perf_counter(), 0
        with Progress("distill", f"{what} of a block", len(wanted)) as progress:
            for result in self._streamed(engine, wanted):
                tokens += len(result.token_ids)
                progress.advance(1, f"{tokens / (time.perf_counter() - started):.0f} tokens/s")
                yield result

    def _streamed(self, engine: RequestEngine, wanted: list[Request]) -> Iterator[Result]:
        try:
            yield from engine.stream(wanted)
        except (InputError, GeneratorExit):
            raise
        except Exception as error:
            if self.vllm is None:
                raise
            raise StoppedError(f"distill: vLLM failed ({first_line(error)}): run again; every row that was written is "
                               "kept") from error


class PromptMaker(_Decoder):
    """Samples user turns from the base itself, given SEEDS. Hands on `candidates`, and how many tries were `rejected`."""

    def __call__(self, given: Rows) -> Iterator[Rows]:
        opening = tuple(user_turn_opening(self.texts.tokenizer))
        requests = [Request(str(index), opening + self._start(index), self.settings.max_new_tokens,
                            self.settings.temperature, index) for index in given.table["index"].to_pylist()]
        requests.sort(key=lambda request: -len(request.prompt_ids))
        found = ((result.id, self._row(result)) for result in self.decode(requests, "prompts"))
        for tried in in_order(found, [request.id for request in requests], self.settings.rows_per_file):
            rows = [row for row in tried if row is not None]
            yield rows_of("candidates", rows, rejected=len(tried) - len(rows))

    def _start(self, index: int) -> tuple[int, ...]:
        """The tokens that candidate `index` begins with."""
        start = self.settings.starts[index % len(self.settings.starts)]
        return tuple(self.texts.tokenizer(start, add_special_tokens=False).input_ids)

    def _row(self, result: Result) -> dict[str, Any] | None:
        """A prompt row, or None for a candidate that did not end, is too short, or is not text."""
        if result.finish_reason != "stop" or len(result.token_ids) <= SHORTEST_PROMPT:
            return None
        text = self.texts.decode(self._start(int(result.id)) + result.token_ids).strip()
        if not text or "\ufffd" in text:
            return None
        prompt_id = content_id("chat", text)
        return {"prompt_id": prompt_id, "messages": None, "prompt": text, "source": f"self/{int(result.id):08d}",
                "prompt_ids": self.texts.encode_prompt(text), "split": split_of(prompt_id, self.settings.held_out)}


class Answerer(_Decoder):
    """Answers prompts; the hidden states of prompt and answer are those of the decoding itself, but where vLLM answers: it keeps
    them to itself, and a flow after its own computes them.

    Given TO_ANSWER it hands on `responses` and their `features` in turn, then `errors/answers`; given ANSWERED, whose hidden
    states were lost or not wanted before, it computes `features` by a forward over each row. A block that is answered again is
    cut in the same way, whatever the order in which its answers end.
    """

    def __call__(self, given: Rows) -> Iterator[Rows]:
        rows = given.table.to_pylist()
        if given.name == ANSWERED:
            yield from self.features(rows)
            return
        stored = {row["id"] for row in rows if row.pop("has_features")}
        tasks = {row["id"]: row for row in rows}
        requests, errors = self._requests(rows, stored)
        # longest prompts first: sequences that start together end at about the same step, and prefill has little padding
        requests.sort(key=lambda request: (-len(request.prompt_ids), request.id))
        found = ((result.id, self._response(tasks[result.id], result)) for result in self.decode(requests, "answers"))
        sampled: list[tuple[dict[str, Any], torch.Tensor]] = []
        for answered in in_order(found, [request.id for request in requests], self.settings.rows_per_file):
            yield rows_of("responses", [row for row, _ in answered])
            recorded = [(row, hidden) for row, hidden in answered if hidden is not None]
            size = self._part_rows([row for row, _ in recorded])
            for start in range(0, len(recorded), size):
                yield rows_of("features", [self._feature_row(*one) for one in recorded[start:start + size]])
            sampled += [one for one in recorded if is_in_share(one[0]["id"], self.settings.check_share)]
        if errors:
            yield rows_of("errors/answers", errors)
        if sampled:  # after the block, when the engine and its cache are gone: the worker holds one large thing at a time
            yield self.checked(sampled)

    def _response(self, task: dict[str, Any], result: Result) -> Recorded:
        return {**task, "response_ids": list(result.token_ids), "finish_reason": result.finish_reason,
                "base": str(self.texts.identity)}, result.hidden

    def checked(self, recorded: list[tuple[dict[str, Any], torch.Tensor]]) -> Rows:
        """Counts of rows that are computed a second time, by a forward over prompt and answer: hidden states `checked` and those
        that are `close` to what decoding recorded; greedy tokens `compared` and those that `agreed`."""
        counts: Counter[str] = Counter()
        known = {row["id"]: hidden for row, hidden in recorded}
        for row, exact in self._computed([row for row, _ in recorded]):
            far = (known[row["id"]].to(exact.device) - exact).float().norm(dim=-1) / exact.float().norm(dim=-1)
            counts += Counter(checked=len(far), close=int((far <= CLOSE[self.base.identity.weight_format]).sum()))
            counts += self._greedy_agreement(row, exact)
        return rows_of("features", [], **counts)

    def features(self, rows: list[dict[str, Any]]) -> Iterator[Rows]:
        """Response rows with their hidden states, in parts, with counts of greedy tokens `compared` and those that `agreed`."""
        size = self._part_rows(rows)
        for start in range(0, len(rows), size):
            counts: Counter[str] = Counter()
            made: list[dict[str, Any]] = []
            for row, hidden in self._computed(rows[start:start + size]):
                counts += self._greedy_agreement(row, hidden)
                made.append(self._feature_row(row, hidden))
            yield rows_of("features", made, **counts)

    def _computed(self, rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        """Response rows with the hidden states [T, D] of a forward over prompt and answer, shortest first."""
        ordered = sorted(rows, key=lambda row: len(row["prompt_ids"]) + len(row["response_ids"]))
        for group in _by_padded_size(ordered):
            sequences = [row["prompt_ids"] + row["response_ids"] for row in group]
            yield from zip(group, self.base.hidden_states(sequences), strict=True)

    def _part_rows(self, rows: list[dict[str, Any]]) -> int:
        """Rows of one part, by the longest that their answers can be, not by what they are: an answer that is computed again may
        be a near-tie's other one."""
        longest = max((len(row["prompt_ids"]) for row in rows), default=1) + self.settings.max_new_tokens
        per_row = longest * self.settings.width * VALUE_BYTES[self.settings.feature_dtype]
        return max(1, min(FEATURE_ROWS, FEATURE_BYTES // per_row))

    def _greedy_agreement(self, row: dict[str, Any], hidden: torch.Tensor) -> Counter[str]:
        """How many tokens of a greedy answer were `compared`, and how many `agreed`: are the argmax of `logits(hidden)` one
        position earlier. With hidden states that are off by one position, almost none would be."""
        if row["temperature"] != 0:
            return Counter()
        prompt, answer = len(row["prompt_ids"]), torch.tensor(row["response_ids"], device=hidden.device)
        predicted = self.base.argmax(hidden[prompt - 1:prompt - 1 + len(answer)])
        return Counter(agreed=int((predicted == answer).sum()), compared=len(answer))

    def _feature_row(self, row: dict[str, Any], hidden: torch.Tensor) -> dict[str, Any]:
        kind = torch.bfloat16 if self.settings.feature_dtype == "bf16" else torch.float32
        values = hidden.to("cpu", kind).contiguous()
        raw = values.view(torch.int16 if kind == torch.bfloat16 else torch.int32).numpy()
        return {**row, "hidden": np.ascontiguousarray(raw).astype(raw.dtype.newbyteorder("<"), copy=False).tobytes(),
                "hidden_dtype": self.settings.feature_dtype, "hidden_tokens": hidden.shape[0],
                "hidden_width": hidden.shape[1], "hidden_layer": "last"}

    def _requests(self, rows: Iterable[dict[str, Any]], stored: set[str]) -> tuple[list[Request], list[dict[str, Any]]]:
        """Requests, and error rows for prompts that the base cannot answer; `stored`: ids whose hidden states stand already."""
        requests, errors = [], []
        for row in rows:
            wanted = row["id"] not in stored and (self.settings.features == "all" or row["split"] == "held_out")
            request = Request(row["id"], tuple(row["prompt_ids"]), self.settings.max_new_tokens, row["temperature"],
                              row["seed"], hidden_states=wanted and self.vllm is None)
            try:
                if self.vllm is not None:
                    self.vllm.check(request)
                else:
                    request.check(self.texts.vocab_size, self.texts.context_limit)
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
