"""The records that the engine returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from hydra_core.sampling.request import TokenLogprob

FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class Result:
    """A finished sequence.

    `steps`: base forwards after prefill; `drafted`, `accepted`: draft nodes verified and kept; `prefill_seconds`:
    from admission to the first token; `decode_seconds`: from then on, shared with the other sequences of the batch;
    `logprobs`: one per token, None when not requested; `lossy`: the request uses a mode that changes answers;
    `accepted_lengths`: number of steps that accepted 0, 1, 2, ... drafts, up to the most that occurred; `hidden`: the base's
    hidden states of prompt and answer, [T, D] on the host, None when not requested or cancelled; `cached_tokens`: tokens of the
    prompt whose keys and values were copied from another sequence.
    """

    id: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    logprobs: tuple[TokenLogprob, ...] | None = None
    lossy: bool = False
    accepted_lengths: tuple[int, ...] = ()
    hidden: Tensor | None = field(default=None, compare=False, repr=False)
    cached_tokens: int = field(default=0, compare=False)

    @property
    def tokens_per_step(self) -> float:
        """Tokens after the first per base forward after prefill: 1 for plain decoding, 0 when no step was needed."""
        return (len(self.token_ids) - 1) / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first per second of decoding, 0 where none of it took time."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class StepOutput:
    """New tokens of one sequence in one engine step, with the result when the sequence ended."""

    id: str
    token_ids: tuple[int, ...]
    result: Result | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
