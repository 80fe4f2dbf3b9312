"""What engines share: requests join a running batch and leave it as results, whoever computes the steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hydra_core.base.text_base import TextBase
from hydra_core.decoding.records import Result, StepOutput
from hydra_core.decoding.text import TextStream
from hydra_core.errors import InputError
from hydra_core.sampling.request import Request


class RequestEngine:
    """An engine as its callers see it: `engine.Engine`, and `interop.vllm_engine.VllmEngine`, which has vLLM compute.

    `base`: without weights perhaps; `max_batch_size`: sequences that run at once; `context_limit`: tokens of prompt and answer;
    `resets_in_place`: whether `reset` takes no longer than a few steps. One thread drives it.
    """

    base: TextBase
    max_batch_size: int
    context_limit: int
    resets_in_place = True
    _interrupted = False

    @property
    def running(self) -> int:
        """Sequences that decode or whose prompts are being computed."""
        raise NotImplementedError

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch yet."""
        raise NotImplementedError

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        raise NotImplementedError

    @property
    def kv_use(self) -> float:
        """Share of the key and value slots that hold tokens."""
        raise NotImplementedError

    @property
    def most_prompt_tokens(self) -> int:
        """Prompt tokens that one step computes at most."""
        raise NotImplementedError

    @property
    def most_taken(self) -> int:
        """Requests that `stream` hands over at once."""
        return self.max_batch_size

    def check(self, request: Request) -> None:
        """Raise InputError when `request` cannot be decoded here, RuntimeError after an exception in `step`."""
        raise NotImplementedError

    def add(self, request: Request) -> None:
        """Queue a request; it joins the batch at a later step. Raises InputError as `check` does."""
        raise NotImplementedError

    def cancel(self, request_id: str) -> None:
        """End a request at the next step. An unknown id is ignored, since the request may just have finished."""
        raise NotImplementedError

    def forget(self, ids: Iterable[str]) -> None:
        """Cancel these requests, whose results nobody reads."""
        for name in ids:
            self.cancel(name)
        if not self._interrupted:
            self._drop_cancelled()

    def _drop_cancelled(self) -> list[StepOutput]:
        """End the sequences that were cancelled."""
        raise NotImplementedError

    def unstarted(self) -> list[Request]:
        """Requests that a failed step has not touched, so that another one may answer them."""
        raise NotImplementedError

    def step(self) -> list[StepOutput]:
        """Advance the sequences. After an exception every later call raises RuntimeError until `reset`."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all sequences, so that an engine whose step raised an exception can be used again."""
        raise NotImplementedError

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Decode all requests; results in the order given.

        Raises InputError before any work when a request is bad or when two have the same id.
        """
        for request in requests:
            self.check(request)
        if twice := [name for name, count in Counter(request.id for request in requests).items() if count > 1]:
            raise InputError(f"request {twice[0]}: id: is used by more than one request of the list")
        results = {result.id: result for result in self.stream(requests)}
        return [results[request.id] for request in requests]

    def answer(self, prompts: Sequence[str], max_new_tokens: int = 256, **settings: Any) -> list[str]:
        """Texts for prompts, in order; each prompt is one user turn where the base has a chat template.

        `settings`: fields of `Request`. Samples are independent of each other, those of equal prompts too: prompt number i is
        choice i of the seed. Raises InputError before any work when a prompt or a setting is bad.
        """
        requests = [
            Request(str(number), tuple(self.base.encode_prompt(prompt)), max_new_tokens, **({"choice": number} | settings))
            for number, prompt in enumerate(prompts)]
        texts = []
        for request, result in zip(requests, self.generate(requests), strict=True):
            text = TextStream(self.base.decode, request.stop)
            text.push(result.token_ids)
            text.finish()
            texts.append(text.sent)
        return texts

    def stream(self, requests: Iterable[Request]) -> Iterator[Result]:
        """Results as they finish; requests are taken only as the batch has room.

        When the iteration is abandoned, or a request is bad (InputError), its requests that still run are cancelled.
        """
        source, mine = iter(requests), set[str]()
        try:
            while True:
                while self.running + self.waiting < self.most_taken and (request := next(source, None)) is not None:
                    self.add(request)
                    mine.add(request.id)
                if not self.has_work:
                    return
                for output in self.step():
                    if output.result is not None:
                        mine.discard(output.id)
                        yield output.result
        finally:
            self.forget(mine)
