"""The replicas: each has one base and one running batch."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from ray import serve
from ray.serve.exceptions import RayServeException

from hydra_core.decoding import Engine, RequestEngine, Result, StepOutput, TextStream
from hydra_core.errors import InputError
from hydra_core.sampling import Request, TokenLogprob, Typical, choices
from pipelines.runtime.logs import speak
from pipelines.serve.drift import interval_low
from pipelines.serve.engine_loop import EngineFailed, EngineLoop, longest_step_seconds, trial_of, warm_up
from pipelines.serve.messages import Answer, AppArgs, Generation, Piece, Refusal, Token, is_text
from pipelines.serve.metrics import ReplicaMetrics, Unfinished
from pipelines.serve.model_identity import ModelDigest, base_text
from pipelines.serve.prompt_length import PromptLength, texts_of
from pipelines.serve.recorder import Recorder, Recording, record_of
from pipelines.serve.stream_merge import merged
from pipelines.serve.token_texts import TokenTexts
from pipelines.serve.user_config import Heads, load_app_base, load_drafter, make_engine, start_vllm

log = logging.getLogger("ray.serve")


class DecodeServer:
    """One replica. Serve calls `reconfigure`, which makes the engine, before any request."""

    def __init__(self, args: AppArgs) -> None:
        speak()
        torch.set_num_threads(args.threads)
        self.args = args
        self.base = load_app_base(args)
        self.prompt_length = PromptLength(self.base.tokenizer, args.max_prompt_tokens or self.base.context_limit)
        self.metrics = ReplicaMetrics()
        self.recorder = None if args.record is None else Recorder(Recording(**args.record), self.base.decode,
                                                                  self.metrics.recorded)
        self.engine_loop: EngineLoop | None = None
        self.heads: Heads | None = None
        self.serving: ModelDigest | None = None
        self.rejected: dict[str, Any] | None = None
        self.tried: dict[str, Any] | None = None
        self.in_flight, self.hung_seconds = 0, args.hung_seconds
        self.name = _replica_name()
        self.tokens = TokenTexts(self.base)
        self.loader = ThreadPoolExecutor(1, "heads")

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Decode with other heads; sequences in flight go on with the same tokens. Requests for the heads that run already change
        nothing.

        Heads that do not load change nothing, since an exception would end the replica; `info` reports them as rejected, until
        others are asked for. Raises InputError where there are no earlier heads.
        """
        try:
            await self._reconfigure(user_config)
        finally:
            self.tried = user_config

    async def _reconfigure(self, user_config: dict[str, Any]) -> None:
        try:
            heads = Heads.of(user_config)
            if heads == self.heads:
                self.rejected = self.rejected if heads.restored else None
                return
            digest = await (self._take_own(heads) if self.args.vllm is None else self._take_in_vllm(heads))
        except Exception as error:
            if self.engine_loop is None:
                raise
            self.rejected = {"label": user_config.get("label"), "version": user_config.get("version"),
                             "digest": user_config.get("digest"), "reason": str(error).splitlines()[0] if str(error) else
                             type(error).__name__}
            self.metrics.rejected()
            log.error("heads rejected, the earlier ones stay", extra={"rejected": self.rejected})
            return
        self.heads, self.rejected = heads, None
        self.serving = ModelDigest(base_text(self.base.identity, self.args), self.base.context_limit, digest)
        self.metrics.serves(heads.version)
        self.metrics.drift.expect(await self._in_loader(interval_low, heads.configuration))
        log.info("decoding with other heads", extra={"heads": asdict(heads)})

    async def _take_own(self, heads: Heads) -> str:
        """Decode with `heads` in our own engine; returns the digest of their files."""
        drafter, trees, digest = await self._in_loader(load_drafter, heads, self.base, self.args, self.engine_loop is None)
        if self.engine_loop is None:
            await self._begin(await self._in_loader(make_engine, self.base, drafter, trees, self.args))
        else:
            engine = self.engine_loop.engine
            assert isinstance(engine, Engine)
            drafting = await self._in_loader(engine.prepare, drafter, trees)
            trial = await self._in_loader(trial_of, engine, drafting)
            await asyncio.wrap_future(self.engine_loop.swap(drafting, trial))
        return digest

    async def _take_in_vllm(self, heads: Heads) -> str:
        """Decode with `heads` in vLLM; returns the digest of their files."""
        if self.engine_loop is not None:
            raise InputError("vLLM keeps the heads that it has started with: start the application again with others")
        engine, digest = await self._in_loader(start_vllm, heads, self.base, self.args)
        await self._begin(engine)
        return str(digest)

    async def _begin(self, engine: RequestEngine) -> None:
        """Decode a few tokens with a new engine, then start its loop."""
        await self._in_loader(warm_up, engine)
        self.hung_seconds = max(self.args.hung_seconds, await self._in_loader(longest_step_seconds, engine))
        self.engine_loop = self._loop_of(engine)

    async def _in_loader(self, work: Callable[..., Any], *given: Any) -> Any:
        """Do what takes long beside the answers, always in one thread: the allocator keeps some 70 MiB of each thread that has
        loaded heads, so a pool of threads grows with every thread that takes its turn."""
        return await asyncio.get_running_loop().run_in_executor(self.loader, work, *given)

    @property
    def failed(self) -> bool:
        """Whether the engine failed: nothing is answered any more."""
        return self.engine_loop is not None and self.engine_loop.failure is not None

    def _loop_of(self, engine: RequestEngine) -> EngineLoop:
        return EngineLoop(engine, self.metrics.load, self.metrics.failed, self.hung_seconds)

    async def restart(self) -> None:
        """Use the engine again after it failed for good, where no Serve replaces the replica. Raises RuntimeError when it
        hangs."""
        loop = self.engine_loop
        assert loop is not None and loop.failure is not None
        if not await asyncio.to_thread(loop.is_over):
            raise RuntimeError(f"the engine hangs: {loop.failure}") from loop.failure
        await asyncio.to_thread(loop.engine.reset)
        await asyncio.to_thread(warm_up, loop.engine)
        self.engine_loop = self._loop_of(loop.engine)

    async def generate(self, generation: Generation) -> Answer | Refusal:
        """The whole answer to a request with `n` = 1."""
        found = await self.answers(generation)
        return found if isinstance(found, Refusal) else found[0]

    async def answers(self, generation: Generation) -> list[Answer] | Refusal:
        """All whole answers, by index; or why there are none."""
        found = []
        async for item in self.stream(generation):
            if isinstance(item, Refusal):
                return item
            if isinstance(item, Answer):
                found.append(item)
        return sorted(found, key=lambda answer: answer.index)

    async def stream(self, generation: Generation) -> AsyncIterator[Piece | Answer | Refusal]:
        """Pieces of text and, for each choice, its answer; or one refusal. Leaving early cancels the sequences."""
        loop = self.engine_loop
        if loop is None or loop.failure is not None:
            yield Refusal(503, "the engine of this replica has failed and another one is being started: try again later",
                          replica=self.name)
            return
        if self.in_flight + generation.n > self.args.room:
            yield Refusal(429, f"{self.in_flight} answers are being made already: try again later")
            return
        now = asyncio.get_running_loop().time()
        waited = max(0.0, time.time() - generation.arrived) if generation.arrived is not None else 0.0
        deadline = now - waited + generation.seconds if generation.seconds is not None else None
        if deadline is not None and deadline <= now:
            yield _out_of_time(generation)
            return
        self.in_flight += generation.n
        try:
            requests = await asyncio.to_thread(self._requests, generation)  # tokenizing a long text here would block every stream
            decoded = [self._decode(loop, generation, index, request, waited, deadline) for index, request in enumerate(requests)]
            async with contextlib.aclosing(merged(decoded, deadline)) as items:  # leaving cancels the sequences at once
                async for item in items:
                    yield item
        except TimeoutError:
            yield _out_of_time(generation)
        except EngineFailed as failed:
            gone = self.name if loop.failure is not None else None  # else the engine is restarted already
            yield Refusal(503, f"{failed}: try again later", failed.in_flight, gone)
        except InputError as error:
            yield Refusal(400, _with_client_field(_without_id(str(error), generation.id), generation))
        finally:
            self.in_flight -= generation.n

    def _requests(self, generation: Generation) -> list[Request]:
        self.prompt_length.check([text for text in (generation.prompt, generation.text) if text is not None]
                                 + texts_of(generation.messages or []))
        prompt = tuple(self._prompt_ids(generation))
        if self.args.max_prompt_tokens is not None:  # else the context's limit, which `Request.check` tells of
            self.prompt_length.check_tokens(len(prompt))
        request = Request(
            generation.id, prompt, generation.max_new_tokens, generation.temperature, generation.seed,
            stop=generation.stop, top_p=generation.top_p, presence_penalty=generation.presence_penalty,
            frequency_penalty=generation.frequency_penalty, repetition_penalty=generation.repetition_penalty,
            top_k=generation.top_k, min_p=generation.min_p, stop_ids=self._stop_ids(generation), logprobs=generation.logprobs,
            lossy_typical=Typical() if generation.speculative == "lossy-typical" else None,
            speculate=generation.speculative != "off")
        request.check(self.base.vocab_size, self.base.context_limit, texts=self.base.tokenizer is not None)
        return choices(request, generation.n)

    def _stop_ids(self, generation: Generation) -> tuple[int, ...] | None:
        """None: the base's own."""
        if not generation.stop_ids and not generation.ignore_eos:
            return None
        return (*(() if generation.ignore_eos else self.base.stop_ids), *generation.stop_ids)

    async def _decode(self, loop: EngineLoop, generation: Generation, index: int, request: Request, waited: float,
                      deadline: float | None) -> AsyncGenerator[Piece | Answer, None]:
        started = last = time.perf_counter()
        serving, heads = self.serving, self.heads  # heads that come later change no token
        made_by = serving.fingerprint if serving is not None else None
        as_benched = generation.temperature == 0 and generation.speculative == "drafter"
        accepted: list[int] = []
        text = TextStream(self.base.decode, generation.stop)
        tokens: list[Token] = []
        result: Result | None = None
        outputs, made = loop.stream(request), 0
        ended: Unfinished | None = "cancelled"
        try:
            async for output in outputs:
                now = time.perf_counter()
                if made == 0:
                    self.metrics.first_token(waited + now - started)
                else:
                    self.metrics.step(now - last, len(output.token_ids))
                    accepted.append(len(output.token_ids) - 1)
                    if as_benched and loop.running <= 1:
                        self.metrics.drift.step(len(output.token_ids))
                piece = self._piece(index, output, text, generation.stop_ids, made == 0)
                last, result, made = now, output.result, made + len(output.token_ids)
                tokens += piece.tokens
                yield piece
            ended = None
        except InputError:  # there is no answer
            ended = None
            raise
        except EngineFailed:
            ended = "failed"
            raise
        finally:
            await outputs.aclose()  # cancels the sequence at once
            if ended is not None and result is None:
                if deadline is not None and asyncio.get_running_loop().time() >= deadline - 0.001:
                    ended = "timeout"
                self.metrics.unfinished(ended, made)
                log.info(ended, extra={"answer_id": generation.id, "choice": index, "completion_tokens": made})
        assert result is not None
        answer = _answer(generation, index, text.sent, result, tuple(tokens), time.perf_counter() - started, made_by)
        self.metrics.answer(answer)
        log.info("answered", extra=log_fields(answer))
        if self.recorder is not None and serving is not None and heads is not None and self.recorder.wants(generation):
            self.recorder.offer(record_of(generation, result, accepted, (serving.base, serving.configuration, heads.version)))
        yield answer

    def _piece(self, index: int, output: StepOutput, text: TextStream, stop_ids: tuple[int, ...], first: bool) -> Piece:
        """The text of one step; text that was held back comes with the last one. One of `stop_ids` has no text where it ends an
        answer, as the base's own have none."""
        ends = output.result is not None and output.result.finish_reason == "stop"
        shown = output.token_ids[:-1] if ends and output.token_ids[-1] in stop_ids else output.token_ids
        fresh = text.push(shown)
        if output.result is not None:
            fresh += text.finish()
        count = len(output.token_ids)
        depths = tuple(depth if depth < count else 0 for depth in range(1, count + 1))
        return Piece(index, fresh, depths, tuple(self._token(token, first and place == 0)
                                                 for place, token in enumerate(output.logprobs or ())))

    def _token(self, found: TokenLogprob, first: bool) -> Token:
        top = tuple(self.tokens.named(*one, first=first) for one in found.top)
        return self.tokens.named(found.token, found.logprob, top, first)

    def _prompt_ids(self, generation: Generation) -> list[int]:
        if generation.prompt_ids is not None:
            return generation.prompt_ids
        if not is_text([generation.prompt, generation.text, generation.messages]):
            raise InputError("prompt: holds half a character (a lone surrogate)")
        if generation.text is not None:
            if self.base.tokenizer is None:
                raise InputError("prompt: the base has no tokenizer: give token ids")
            return list(self.base.tokenizer(generation.text).input_ids)
        return self.base.encode_prompt(generation.prompt, generation.messages)

    async def info(self) -> dict[str, Any]:
        """The model, its load, the heads that were rejected last and the `user_config` that was tried last. `at`: Unix time."""
        assert self.heads is not None and self.serving is not None and self.engine_loop is not None
        return {"label": self.heads.label, "version": self.heads.version, **asdict(self.serving),
                "in_flight": self.in_flight, "running": self.engine_loop.running, "slots": self.args.max_batch_size,
                "failed": self.failed, "rejected": self.rejected,
                "heads": self.heads.in_args(), "tried": self.tried, "at": time.time()}

    async def record_routing_stats(self) -> dict[str, Any]:
        """`info`, for all who send requests to this replica: Serve asks for it now and then, whatever the replica does."""
        return {} if self.engine_loop is None or self.heads is None else await self.info()

    def __del__(self) -> None:
        """Serve calls it when the replica ends: what was recorded is written."""
        if getattr(self, "recorder", None) is not None:
            self.recorder.close()

    def check_health(self) -> None:
        """Raise RuntimeError when the engine has failed for good or hangs, so that Serve replaces the replica."""
        if self.engine_loop is None:
            return
        self.engine_loop.check()
        if self.failed:
            raise RuntimeError("the engine has failed") from self.engine_loop.failure


def _out_of_time(generation: Generation) -> Refusal:
    return Refusal(504, f"the answer was not complete within the {generation.seconds:g} seconds that a request may take: ask for "
                        "fewer tokens, or try again when there is less to do")


def _replica_name() -> str | None:
    """What Serve's routers call this replica; None where no Serve runs it."""
    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return None


def _without_id(message: str, name: str) -> str:
    """An error message without the id that the client did not give: of the request, or of one of its choices."""
    return re.sub(rf"^request {re.escape(name)}(/\d+)?: ", "", message)


def _with_client_field(message: str, generation: Generation) -> str:
    """An error message that names the field that the client gave."""
    field, colon, rest = message.partition(":")
    if field in ("prompt", "prompt_ids"):
        field = "prompt" if generation.messages is None else "messages"
    elif field == "stop_ids":
        field = "stop_token_ids"
    return field + colon + rest


def _answer(generation: Generation, index: int, text: str, result: Result, tokens: tuple[Token, ...],
            seconds: float, made_by: str | None) -> Answer:
    return Answer(generation.id, text, result.token_ids, result.finish_reason, len(result.prompt_ids), result.steps,
                  result.drafted, result.accepted, seconds, index, result.accepted_lengths,
                  tokens if generation.logprobs is not None else None, made_by, result.cached_tokens)


def log_fields(answer: Answer) -> dict[str, Any]:
    """The fields of an answer that are logged: never its text."""
    return {"answer_id": answer.id, "choice": answer.index, "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens, "cached_tokens": answer.cached_tokens,
            "completion_tokens": len(answer.token_ids), "steps": answer.steps, "accepted": answer.accepted,
            "seconds": round(answer.latency_seconds, 4)}
