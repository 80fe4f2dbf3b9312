"""vLLM in the place of our own engine: the same requests in, the same results out, token for token in fp32 but for near-ties.

Prompts are token ids by our own templating; vLLM gets no tokenizer. Stop tokens are the base's as our engine has them, and stop
strings are looked for in the text as our engine decodes it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hydra_core.base.text_base import WeightlessBase
from hydra_core.decoding.records import FinishReason, Result, StepOutput
from hydra_core.decoding.request_engine import RequestEngine
from hydra_core.decoding.text import TextStream
from hydra_core.errors import InputError
from hydra_core.interop import vllm_compat
from hydra_core.interop.vllm_installed import check_vllm
from hydra_core.interop.vllm_requests import sampling_of
from hydra_core.sampling.request import Request, TokenLogprob

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""Weight formats that vLLM computes in, by its names."""
CPU_CACHE_GIB = 4.0
"""Room for keys and values on a CPU where none is asked for: vLLM would take nine tenths of the machine's memory."""
SET = {"model": "base.model", "dtype": "base.dtype", "max_model_len": "base.context_limit", "tokenizer": "base.model",
       "max_num_seqs": "serve.max_batch_size or distill.max_batch_size", "tensor_parallel_size": "vllm.tensor_parallel_size",
       "gpu_memory_utilization": "vllm.gpu_memory_utilization", "kv_cache_memory_bytes": "vllm.kv_cache_gib",
       "enforce_eager": "vllm.enforce_eager", "skip_tokenizer_init": "", "generation_config": "", "disable_log_stats": "",
       "trust_remote_code": ""}
"""Arguments of vLLM's that have a setting of ours, or none."""
log = logging.getLogger(__name__)
Found = TypeVar("Found")


@dataclass(frozen=True)
class VllmSettings:
    """How vLLM runs the base; plain values. None: as vLLM has it, but on a CPU without compilation and with `CPU_CACHE_GIB`.

    `num_speculative_tokens`: that heads draft in a step, None: one for each; `arguments`: further engine arguments by vLLM's own
    names; `any_version`: of vLLM, tried or not.
    """

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    kv_cache_gib: float | None = None
    enforce_eager: bool | None = None
    num_speculative_tokens: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    any_version: bool = False

    def check(self) -> None:
        """Raise InputError for an argument that is set elsewhere."""
        for name in self.arguments:
            if name in SET:
                raise InputError(f"vllm.arguments.{name}: {f'set {SET[name]}' if SET[name] else 'is set by this project'}")


@dataclass
class _Sequence:
    """A request in vLLM. `accepted`: number of its steps that accepted 0, 1, 2, ... drafts; `text`: where it has stop strings."""

    request: Request
    text: TextStream | None
    started: float
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    accepted: Counter[int] = field(default_factory=Counter)
    drafted: int = 0
    first_token: float | None = None


class VllmEngine(RequestEngine):
    """vLLM's engine, in this process.

    `speculative`: vLLM's `speculative_config`, None: without drafts. All calls of vLLM come from one thread of the engine's own:
    the device and the processors that vLLM has chosen belong to a thread. Raises InputError where vLLM is missing or does not
    start with this base.
    """

    base: WeightlessBase
    resets_in_place = False  # the weights are loaded again

    def __init__(self, base: WeightlessBase, settings: VllmSettings, *, max_batch_size: int = 8,
                 speculative: Mapping[str, Any] | None = None) -> None:
        installed = check_vllm(settings.any_version)
        self.base, self.max_batch_size, self.context_limit = base, max_batch_size, base.context_limit
        self.on_cpu, self.drafts = installed.on_cpu, speculative is not None or "speculative_config" in settings.arguments
        self.arguments = engine_arguments(base, settings, max_batch_size, self.on_cpu, speculative)
        self._thread = ThreadPoolExecutor(1, "vllm")
        self._counts = vllm_compat.StepCounts()
        self._engine: Any = None
        self._begin()

    def _begin(self) -> None:
        """Start vLLM without sequences."""
        self._sequences: dict[str, _Sequence] = {}
        self._cancelled: set[str] = set()
        self._interrupted = False
        try:
            self._engine = self._call(lambda: vllm_compat.start_engine(self.arguments, self._counts))
        except InputError:
            raise
        except Exception as error:  # vLLM raises a dozen types for bases, arguments and memory that do not fit
            log.debug("vLLM does not start", exc_info=error)
            limit = " (max_model_len is base.context_limit)" if "max_model_len" in str(error) else ""
            raise InputError(f"engine=vllm: vLLM does not start with {self.base.folder}: {_one_line(error)}{limit}") from None

    def close(self) -> None:
        """End vLLM and free what it holds."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            self._call(lambda: vllm_compat.stop_engine(engine))

    def reset(self) -> None:
        self.close()
        self._begin()

    @property
    def running(self) -> int:
        return min(len(self._sequences), self.max_batch_size)

    @property
    def waiting(self) -> int:
        return len(self._sequences) - self.running

    @property
    def most_taken(self) -> int:
        return 2 * self.max_batch_size  # a request waits behind each that runs, so that no slot is idle for a step

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def kv_use(self) -> float:
        return self._counts.kv_use

    @property
    def most_prompt_tokens(self) -> int:
        return vllm_compat.most_prompt_tokens(self._engine)

    def unstarted(self) -> list[Request]:
        return []  # vLLM does not tell which requests a failed step has read

    def check(self, request: Request) -> None:
        self._checked(request)

    def _checked(self, request: Request) -> dict[str, Any]:
        """The arguments of vLLM's `SamplingParams`."""
        self._refuse_interrupted()
        request.check(self.base.vocab_size, self.context_limit, texts=self.base.tokenizer is not None)
        if request.id in self._sequences:
            raise InputError(f"request {request.id}: id: is already running")
        return sampling_of(request, self.base.stop_ids, self.drafts, self.on_cpu)

    def add(self, request: Request) -> None:
        sampling = self._checked(request)
        try:
            self._call(lambda: self._add(request, sampling))
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"request {request.id}: vLLM refuses it: {_one_line(error)}") from None
        text = TextStream(self.base.decode, request.stop) if request.stop else None
        self._sequences[request.id] = _Sequence(request, text, time.perf_counter())

    def _add(self, request: Request, sampling: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**sampling, output_kind=RequestOutputKind.DELTA)
        self._engine.add_request(request.id, tokens_input(list(request.prompt_ids)), params)

    def cancel(self, request_id: str) -> None:
        if request_id in self._sequences:
            self._cancelled.add(request_id)

    def step(self) -> list[StepOutput]:
        """Advance every sequence by one step of vLLM, which may accept several drafted tokens."""
        self._refuse_interrupted()
        outputs = self._drop_cancelled()
        if not self._sequences:
            return outputs
        self._interrupted = True
        found = self._call(self._engine.step)
        outputs += self._taken([one for one in found if one.request_id in self._sequences], *self._counts.take())
        self._interrupted = False
        return outputs

    def _taken(self, found: list[Any], drafted: int, accepted: int) -> list[StepOutput]:
        """The new tokens of vLLM's outputs. `drafted`, `accepted`: by vLLM's counts of the step. What was accepted behind the end
        of a sequence shows in no token: it is added to those that end, as far as their drafts reach."""
        decoding = [one for one in found if self._sequences[one.request_id].tokens]
        hidden = accepted - sum(len(one.outputs[0].token_ids) - 1 for one in decoding)
        for place, one in enumerate(decoding):
            sequence, shown = self._sequences[one.request_id], len(one.outputs[0].token_ids) - 1
            share = drafted // len(decoding) + (place < drafted % len(decoding))
            more = max(0, min(hidden, share - shown)) if one.finished else 0
            hidden -= more
            sequence.accepted[shown + more] += 1
            sequence.drafted += share
        outputs, stopped = [], []
        for one in found:
            output, early = self._output(one)
            outputs.append(output)
            stopped += [one.request_id] if early else []
        self._abort(stopped)
        return outputs

    def _output(self, found: Any) -> tuple[StepOutput, bool]:
        """The output of one sequence, and whether it ends here while it would go on in vLLM."""
        sequence, made = self._sequences[found.request_id], found.outputs[0]
        tokens, reason = list(made.token_ids), self._reason(sequence, found)
        if sequence.text is not None:
            for count, token in enumerate(tokens, start=1):
                sequence.text.push([token])
                if sequence.text.stopped:
                    tokens, reason = tokens[:count], "stop"
                    break
        if tokens and sequence.first_token is None:
            sequence.first_token = time.perf_counter()
        sequence.tokens += tokens
        logprobs = None
        if (asked := sequence.request.logprobs) is not None:
            logprobs = tuple(_logprob(token, one, asked) for token, one in zip(tokens, made.logprobs or (), strict=False))
            sequence.logprobs += logprobs
        result = self._close(sequence, reason) if reason is not None else None
        return StepOutput(sequence.request.id, tuple(tokens), result, logprobs), reason is not None and not found.finished

    def _reason(self, sequence: _Sequence, found: Any) -> FinishReason | None:
        """Why vLLM has ended the sequence; None while it goes on."""
        made = found.outputs[0]
        if not found.finished:
            return None
        if made.finish_reason == "length":
            return "length" if len(sequence.tokens) + len(made.token_ids) >= sequence.request.max_new_tokens else "context"
        if made.finish_reason != "stop":
            raise RuntimeError(f"vLLM ended request {sequence.request.id} with {made.finish_reason}")
        return "stop"

    def _close(self, sequence: _Sequence, reason: FinishReason) -> Result:
        now = time.perf_counter()
        began, request = sequence.first_token or now, sequence.request
        lengths = tuple(sequence.accepted[length] for length in range(max(sequence.accepted, default=-1) + 1))
        del self._sequences[request.id]
        self._cancelled.discard(request.id)
        return Result(request.id, request.prompt_ids, tuple(sequence.tokens), reason, sum(lengths), sequence.drafted,
                      sum(length * steps for length, steps in enumerate(lengths)), began - sequence.started, now - began,
                      tuple(sequence.logprobs) if request.logprobs is not None else None, accepted_lengths=lengths)

    def _drop_cancelled(self) -> list[StepOutput]:
        ids = sorted(self._cancelled)
        self._abort(ids)
        results = [self._close(self._sequences[name], "cancelled") for name in ids]
        return [StepOutput(result.id, (), result) for result in results]

    def _abort(self, ids: list[str]) -> None:
        if ids:
            self._call(lambda: self._engine.abort_request(ids))

    def _refuse_interrupted(self) -> None:
        if self._interrupted:
            raise RuntimeError("an exception interrupted an earlier step of vLLM: call reset(), which starts it again")

    def _call(self, work: Callable[[], Found]) -> Found:
        return self._thread.submit(work).result()


def engine_arguments(base: WeightlessBase, settings: VllmSettings, max_batch_size: int, on_cpu: bool,
                     speculative: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of vLLM's `EngineArgs`. Raises InputError for a weight format that vLLM does not compute in, and for
    arguments that are set elsewhere."""
    settings.check()
    kind = base.identity.weight_format
    if kind not in DTYPES:
        raise InputError(f"base.dtype={kind}: vLLM computes in bf16 or fp32: set one of these")
    cache = settings.kv_cache_gib if settings.kv_cache_gib is not None else CPU_CACHE_GIB if on_cpu else None
    eager = settings.enforce_eager if settings.enforce_eager is not None else on_cpu
    optional = {"gpu_memory_utilization": settings.gpu_memory_utilization,
                "kv_cache_memory_bytes": None if cache is None else int(cache * 2**30),
                "speculative_config": None if speculative is None else dict(speculative),
                # Ray is there already: by itself vLLM would start actors, for which nothing is reserved
                "distributed_executor_backend": "mp" if settings.tensor_parallel_size > 1 else None}
    return {"model": str(base.folder), "dtype": DTYPES[kind], "max_model_len": base.context_limit,
            "max_num_seqs": max_batch_size, "tensor_parallel_size": settings.tensor_parallel_size, "enforce_eager": eager,
            "skip_tokenizer_init": True, "generation_config": "vllm", "disable_log_stats": False, "seed": 0,
            **{name: value for name, value in optional.items() if value is not None}, **settings.arguments}


def _logprob(token: int, found: Mapping[int, Any], count: int) -> TokenLogprob:
    """vLLM's log probabilities of one position; it names the chosen token beside the `count` most likely ones."""
    best = sorted((one.rank, name, one.logprob) for name, one in found.items() if one.rank is not None and one.rank <= count)
    return TokenLogprob(token, float(found[token].logprob), tuple((name, float(value)) for _, name, value in best))


def _one_line(error: BaseException) -> str:
    """The text of the first cause, since vLLM hands on what its engine raised, in one line."""
    return (" ".join(str(error).split()) or type(error).__name__)[:400]
