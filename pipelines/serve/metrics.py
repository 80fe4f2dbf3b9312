"""The metrics of a running application: Ray exports them to Prometheus on every node, with the prefix `ray_`, and with the tags
`application`, `deployment` and `replica`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from ray.serve.metrics import Counter, Gauge, Histogram

from pipelines.serve.drift import DriftWatch
from pipelines.serve.engine_loop import Load
from pipelines.serve.messages import Answer

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
WHOLE_SECONDS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0]
TOKENS = [1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0]
COUNTERS = {
    "hydra_prompt_tokens": "tokens of answered prompts",
    "hydra_cached_tokens": "of these, tokens that were known from other requests",
    "hydra_completion_tokens": "tokens answered, those of answers that were not finished too",
    "hydra_decoding_steps": "base forwards of finished answers, after the prompt",
    "hydra_drafted_tokens": "draft tokens verified",
    "hydra_accepted_tokens": "draft tokens accepted",
    "hydra_engine_failures": "exceptions in a step of the engine, and steps that never ended",
    "hydra_engine_restarts": "failures after which the engine was restarted at once",
    "hydra_heads_rejected": "configurations that did not load, so that the earlier one stayed",
}
GAUGES = {
    "hydra_queue_size": "what waits for a slot of the batch: answers in replicas, and requests in the front for a replica",
    "hydra_batch_size": "sequences that decode or are in prefill",
    "hydra_kv_use": "share of the key and value slots that hold tokens",
    "hydra_heads_version": "version of the registered model in use, 0: not registered",
    "hydra_acceptance_hour": "tokens per step in the last hour, of greedy answers that decoded alone, as the bench measures them",
    "hydra_acceptance_low": "the least tokens per step that the interval of the bench has for the heads in use",
    "hydra_acceptance_drift": "whether the last hour is below that interval: 1, or 0",
    "hydra_registry_answers": "whether the registry that is followed answered the last look: 1, or 0",
}
OF_FRONT = ("hydra_registry_answers",)
"""Gauges that the front alone sets."""
HISTOGRAMS = {
    "hydra_tokens_per_step": ("tokens after the first per base forward, of an answer", TOKENS),
    "hydra_first_token_seconds": ("from arrival at the front (or the replica, for batch jobs) to the first token", SECONDS),
    "hydra_between_tokens_seconds": ("seconds of a step per token of the answer", SECONDS),
}
REQUESTS, DEPTHS, FINISHED = "hydra_requests", "hydra_steps_by_accepted_depth", "hydra_answers"
FOLLOWED, RECORDED = "hydra_registry_changes", "hydra_recorded_answers"
REQUEST_SECONDS = "hydra_request_seconds"
TAGGED = (REQUESTS, DEPTHS, FINISHED, FOLLOWED, RECORDED)
"""Counters with tags of their own."""
NAMES = (*COUNTERS, *GAUGES, *HISTOGRAMS, *TAGGED, REQUEST_SECONDS)
Unfinished = Literal["cancelled", "timeout", "failed"]
"""Why an answer was not finished: its client left, its time was over, or the engine failed."""
LOAD_SECONDS = 1.0
"""Between two reports of the load: a step takes milliseconds, and Ray exports every few seconds."""


def series() -> set[str]:
    """The names of the series in Prometheus."""
    counters = {f"ray_{name}_total" for name in (*COUNTERS, *TAGGED)}
    histograms = {f"ray_{name}_{part}" for name in (*HISTOGRAMS, REQUEST_SECONDS) for part in ("bucket", "sum", "count")}
    return counters | histograms | {f"ray_{name}" for name in GAUGES}


class ReplicaMetrics:
    """The metrics of one replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.counters = {name: Counter(name, text) for name, text in COUNTERS.items()}
        self.gauges = {name: Gauge(name, text) for name, text in GAUGES.items() if name not in OF_FRONT}
        self.histograms = {name: Histogram(name, text, boundaries=edges) for name, (text, edges) in HISTOGRAMS.items()}
        self.depths = Counter(DEPTHS, "steps that accepted at least so many drafts", tag_keys=("depth",))
        self.finished = Counter(FINISHED, "answers, by how they ended", tag_keys=("reason",))
        self.kept = Counter(RECORDED, "answers chosen to be recorded, by what became of them", tag_keys=("result",))
        self.drift = DriftWatch(clock)
        self.version, self._clock, self._next_load = 0, clock, 0.0

    def load(self, load: Load) -> None:
        """Called after every step; told once a second."""
        if (now := self._clock()) < self._next_load:
            return
        self._next_load = now + LOAD_SECONDS
        for name, value in (("hydra_queue_size", load.waiting), ("hydra_batch_size", load.running),
                            ("hydra_kv_use", load.kv_use), ("hydra_heads_version", self.version)):
            self.gauges[name].set(value)
        found = self.drift.look()
        for name, known in (("hydra_acceptance_hour", found.tokens_per_step), ("hydra_acceptance_low", found.low)):
            if known is not None:
                self.gauges[name].set(known)
        if found.low is not None:
            self.gauges["hydra_acceptance_drift"].set(float(found.drifted))

    def first_token(self, seconds: float) -> None:
        self.histograms["hydra_first_token_seconds"].observe(seconds)

    def step(self, seconds: float, tokens: int) -> None:
        self.histograms["hydra_between_tokens_seconds"].observe(seconds / max(1, tokens))

    def answer(self, answer: Answer) -> None:
        self.finished.inc(tags={"reason": answer.finish_reason})
        for name, value in (("prompt_tokens", answer.prompt_tokens), ("cached_tokens", answer.cached_tokens),
                            ("completion_tokens", len(answer.token_ids)),
                            ("decoding_steps", answer.steps), ("drafted_tokens", answer.drafted or 0),
                            ("accepted_tokens", answer.accepted)):
            if value:  # a counter raises for 0
                self.counters[f"hydra_{name}"].inc(value)
        if answer.steps:
            self.histograms["hydra_tokens_per_step"].observe(answer.tokens_per_step)
        for depth in range(1, len(answer.accepted_lengths)):
            self.depths.inc(sum(answer.accepted_lengths[depth:]), tags={"depth": str(depth)})

    def unfinished(self, reason: Unfinished, tokens: int) -> None:
        """An answer of which only `tokens` tokens were made."""
        self.finished.inc(tags={"reason": reason})
        if tokens:
            self.counters["hydra_completion_tokens"].inc(tokens)

    def failed(self, restarted: bool) -> None:
        self.counters["hydra_engine_failures"].inc()
        if restarted:
            self.counters["hydra_engine_restarts"].inc()

    def recorded(self, result: str, count: int) -> None:
        """What became of answers that were to be recorded; any thread may tell it."""
        self.kept.inc(count, tags={"result": result})

    def rejected(self) -> None:
        self.counters["hydra_heads_rejected"].inc()

    def serves(self, version: int | None) -> None:
        """Set the version; it is exported with the next load."""
        self.version = version or 0


class FrontMetrics:
    """The metrics of one ingress: requests by route and status, their time, and how many wait for a replica."""

    def __init__(self) -> None:
        self.requests = Counter(REQUESTS, "HTTP requests answered", tag_keys=("route", "status"))  # type: ignore[arg-type]
        self.seconds = Histogram(REQUEST_SECONDS, "from a request's arrival to the end of its answer", boundaries=WHOLE_SECONDS,
                                 tag_keys=("route",))
        self.queue = Gauge("hydra_queue_size", GAUGES["hydra_queue_size"])
        self.registry = Gauge("hydra_registry_answers", GAUGES["hydra_registry_answers"])
        self.changes = Counter(FOLLOWED, "other heads that the registry named, by what became of them",
                               tag_keys=("result",))  # type: ignore[arg-type]

    def request(self, route: str, status: int, seconds: float) -> None:
        self.requests.inc(tags={"route": route, "status": str(status)})
        self.seconds.observe(seconds, tags={"route": route})

    def waiting(self, requests: int) -> None:
        self.queue.set(requests)

    def registry_answers(self, answers: bool | None) -> None:
        """None: no registry is followed, or none was asked yet."""
        if answers is not None:
            self.registry.set(float(answers))

    def followed(self, result: str) -> None:
        """Other heads were named: `changed` or `rejected`."""
        self.changes.inc(tags={"result": result})
