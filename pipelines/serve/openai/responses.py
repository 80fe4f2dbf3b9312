"""OpenAI's responses, as one body and as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from pipelines.serve.messages import Answer, Generation, Piece, Token

CHAT, TEXT = "chat.completion", "text_completion"
DONE = "data: [DONE]\n\n"


def finish_reason(answer: Answer) -> str:
    """`stop`, or `length`, which includes the context limit: OpenAI has no other reason for it."""
    return "stop" if answer.finish_reason == "stop" else "length"


def usage(answers: Sequence[Answer], mode: str) -> dict[str, Any]:
    """Token counts (the prompt counts once), and the speculation counts of all choices together."""
    prompt, completion = answers[0].prompt_tokens, sum(len(answer.token_ids) for answer in answers)
    steps = sum(answer.steps for answer in answers)
    after_first = sum(len(answer.token_ids) - 1 for answer in answers if answer.steps)
    cached = min(answer.cached_tokens for answer in answers)  # later choices copy the prompt of the first
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "speculative": {"mode": mode, "steps": steps, "drafted": sum(answer.drafted or 0 for answer in answers),
                            "accepted": sum(answer.accepted for answer in answers),
                            "tokens_per_step": round(after_first / steps, 4) if steps else 0.0}}


def response(kind: str, model: str, generation: Generation, answers: Sequence[Answer]) -> dict[str, Any]:
    """A whole response; `kind`: `chat.completion` or `text_completion`."""
    found = []
    for answer in answers:
        choice: dict[str, Any] = {"index": answer.index, "finish_reason": finish_reason(answer), "logprobs": None}
        if answer.tokens is not None:
            choice["logprobs"] = logprobs(kind, answer.tokens, 0)
        if kind == CHAT:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        found.append(choice)
    return {"id": generation.id, "object": kind, "created": int(time.time()), "model": model, "choices": found,
            "system_fingerprint": answers[0].system_fingerprint, "usage": usage(answers, generation.speculative)}


def logprobs(kind: str, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """Log probabilities of `tokens`; `offset`: characters of the answer before them."""
    if kind == CHAT:
        return {"content": [{**_logprob_entry(token), "top_logprobs": [_logprob_entry(one) for one in token.top]}
                            for token in tokens],
                "refusal": None}
    offsets = list(accumulate((len(token.text) for token in tokens[:-1]), initial=offset)) if tokens else []
    return {"tokens": [token.text for token in tokens], "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_by_text(token) for token in tokens], "text_offset": offsets}


def _logprob_entry(token: Token) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}


def _by_text(token: Token) -> dict[str, float]:
    """The top_k and the sampled token by text; of tokens with the same text the most likely one."""
    found: dict[str, float] = {}
    for one in (*token.top, token):
        found.setdefault(one.text, one.logprob)
    return found


class Chunks:
    """The events of one stream."""

    def __init__(self, kind: str, model: str, generation: Generation) -> None:
        self.kind, self.generation = kind, generation
        self.head = {"id": generation.id, "object": "chat.completion.chunk" if kind == CHAT else kind,
                     "created": int(time.time()), "model": model}
        self.opened: set[int] = set()
        self.offsets: dict[int, int] = {}
        self.answers: list[Answer] = []

    def of(self, item: Piece | Answer) -> str:
        """The event of a piece, or of the end of a choice."""
        text = item.text if isinstance(item, Piece) else None
        reason = None if isinstance(item, Piece) else finish_reason(item)
        choice: dict[str, Any] = {"index": item.index, "finish_reason": reason, "logprobs": None}
        if self.kind == CHAT:
            role = {} if item.index in self.opened else {"role": "assistant"}
            choice["delta"] = role | ({"content": text} if text is not None else {})
        else:
            choice["text"] = text or ""
        self.opened.add(item.index)
        if isinstance(item, Answer):
            self.answers.append(item)
            self.head["system_fingerprint"] = item.system_fingerprint
        else:
            choice["speculative"] = {"depths": item.depths}
            if item.tokens:
                offset = self.offsets.get(item.index, 0)
                choice["logprobs"] = logprobs(self.kind, item.tokens, offset)
                self.offsets[item.index] = offset + sum(len(token.text) for token in item.tokens)
        return event(self.head | {"choices": [choice]})

    def usage(self) -> str:
        """The last event of a stream that requested usage: counts without choices."""
        return event(self.head | {"choices": [], "usage": usage(self.answers, self.generation.speculative)})


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
