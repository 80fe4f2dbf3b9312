"""Answers in OpenAI's shapes: every value by hand, and the whole read by OpenAI's own client library."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from pipelines.serve.messages import Answer, Generation, Piece, Token
from pipelines.serve.openai import responses
from pipelines.serve.openai.responses import CHAT, DONE, TEXT, Chunks, event, finish_reason, logprobs, response, usage

ZU, PART = "Zü".encode(), b"\xe6"
TOKENS = (Token("Zü", -0.25, ZU, (Token("Zü", -0.25, ZU), Token("a", -1.5, b"a"))),
          Token("\ufffd", -2.0, PART, (Token("x", -0.5, b"x"), Token("\ufffd", -0.75, b"\xe7"))))
GENERATION = Generation("cmpl-1", 9, prompt="x", n=2, speculative="drafter")
FIRST = Answer("cmpl-1", "Zü\ufffd", (7, 8, 9, 4, 3), "stop", 11, 2, 6, 2, 0.5, 0, (0, 2), TOKENS, "fp-1")
SECOND = Answer("cmpl-1", "b", (5, 5, 5, 5), "length", 11, 1, None, 1, 0.5, 1, (0, 1), None, "fp-1")
SHORT = Answer("cmpl-1", "", (2,), "context", 11, 0, 0, 0, 0.1, 0)
CHAT_LOGPROBS = {"content": [
    {"token": "Zü", "logprob": -0.25, "bytes": [90, 195, 188],
     "top_logprobs": [{"token": "Zü", "logprob": -0.25, "bytes": [90, 195, 188]},
                      {"token": "a", "logprob": -1.5, "bytes": [97]}]},
    {"token": "\ufffd", "logprob": -2.0, "bytes": [230],
     "top_logprobs": [{"token": "x", "logprob": -0.5, "bytes": [120]}, {"token": "\ufffd", "logprob": -0.75, "bytes": [231]}]}],
    "refusal": None}
TEXT_LOGPROBS = {"tokens": ["Zü", "\ufffd"], "token_logprobs": [-0.25, -2.0],
                 "top_logprobs": [{"Zü": -0.25, "a": -1.5}, {"x": -0.5, "\ufffd": -0.75}], "text_offset": [4, 6]}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still:
        @staticmethod
        def time() -> float:
            return 1_700_000_000.75

    monkeypatch.setattr(responses, "time", Still)


def test_usage_counts_the_prompt_once_and_every_answer() -> None:
    assert usage([FIRST, SECOND], "lossy-typical") == {
        "prompt_tokens": 11, "completion_tokens": 9, "total_tokens": 20, "prompt_tokens_details": {"cached_tokens": 0},
        "speculative": {"mode": "lossy-typical", "steps": 3, "drafted": 6, "accepted": 3, "tokens_per_step": 2.3333}}
    assert usage([SHORT], "off") == {
        "prompt_tokens": 11, "completion_tokens": 1, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 0},
        "speculative": {"mode": "off", "steps": 0, "drafted": 0, "accepted": 0, "tokens_per_step": 0.0}}
    known = [replace(FIRST, cached_tokens=4), replace(SECOND, cached_tokens=10)]  # the second copies from the first
    assert usage(known, "off")["prompt_tokens_details"] == {"cached_tokens": 4}
    assert usage([FIRST, SHORT], "off")["speculative"]["tokens_per_step"] == 2.0  # an answer without steps counts in neither


@pytest.mark.parametrize(("ours", "theirs"), [("stop", "stop"), ("length", "length"), ("context", "length")])
def test_reasons(ours: str, theirs: str) -> None:
    assert finish_reason(Answer("x", "", (1,), ours, 1, 0, 0, 0, 0.0)) == theirs


def test_a_chat_answer() -> None:
    made = response(CHAT, "m", GENERATION, [FIRST, SECOND])
    assert made == {"id": "cmpl-1", "object": "chat.completion", "created": 1_700_000_000, "model": "m",
                    "system_fingerprint": "fp-1", "usage": usage([FIRST, SECOND], "drafter"), "choices": [
                        {"index": 0, "finish_reason": "stop", "logprobs": CHAT_LOGPROBS,
                         "message": {"role": "assistant", "content": "Zü\ufffd", "refusal": None}},
                        {"index": 1, "finish_reason": "length", "logprobs": None,
                         "message": {"role": "assistant", "content": "b", "refusal": None}}]}
    read = ChatCompletion.model_validate(json.loads(json.dumps(made)), strict=True)
    assert read.choices[0].logprobs is not None and read.choices[1].message.content == "b"
    assert read.usage is not None and read.usage.total_tokens == 20


def test_a_text_answer() -> None:
    made = response(TEXT, "m", GENERATION, [FIRST, SECOND])
    choices = made.pop("choices")
    assert choices == [{"index": 0, "finish_reason": "stop", "text": "Zü\ufffd",
                        "logprobs": TEXT_LOGPROBS | {"text_offset": [0, 2]}},
                       {"index": 1, "finish_reason": "length", "text": "b", "logprobs": None}]
    assert (made["object"], made["created"], made["model"]) == ("text_completion", 1_700_000_000, "m")
    assert Completion.model_validate(made | {"choices": choices}, strict=True).choices[0].logprobs is not None


def test_log_probabilities_of_both_kinds() -> None:
    assert logprobs(CHAT, TOKENS, 4) == CHAT_LOGPROBS
    assert logprobs(TEXT, TOKENS, 4) == TEXT_LOGPROBS
    assert logprobs(TEXT, (), 4) == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    same = Token("a", -3.0, b"a", (Token("a", -0.5, b"a"), Token("a", -1.0, b"a")))  # of equal texts the most likely one
    assert logprobs(TEXT, (same,), 0)["top_logprobs"] == [{"a": -0.5}]


def read(text: str) -> dict[str, Any]:
    assert text.startswith("data: ") and text.endswith("\n\n")
    found: dict[str, Any] = json.loads(text.removeprefix("data: "))
    return found


def test_a_chat_stream() -> None:
    chunks = Chunks(CHAT, "m", GENERATION)
    head = {"id": "cmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "m"}
    made = [read(chunks.of(item)) for item in (Piece(0, "Z", (0, 1), TOKENS), Piece(1, "", (0,)), Piece(0, "ü", (2,)), FIRST,
                                               SECOND)]
    assert made[0] == head | {"choices": [{"index": 0, "finish_reason": None, "logprobs": CHAT_LOGPROBS,
                                           "speculative": {"depths": [0, 1]},
                                           "delta": {"role": "assistant", "content": "Z"}}]}
    assert made[1] == head | {"choices": [{"index": 1, "finish_reason": None, "logprobs": None, "speculative": {"depths": [0]},
                                           "delta": {"role": "assistant", "content": ""}}]}
    assert made[2]["choices"][0]["delta"] == {"content": "ü"}
    assert made[3] == head | {"system_fingerprint": "fp-1", "choices": [
        {"index": 0, "finish_reason": "stop", "logprobs": None, "delta": {}}]}
    assert made[4]["choices"] == [{"index": 1, "finish_reason": "length", "logprobs": None, "delta": {}}]
    last = read(chunks.usage())
    assert last == head | {"system_fingerprint": "fp-1", "choices": [], "usage": usage([FIRST, SECOND], "drafter")}
    for value in (*made, last):
        ChatCompletionChunk.model_validate(value)
    alone = read(Chunks(CHAT, "m", GENERATION).of(FIRST))  # a choice that ends before any text has its role too
    assert alone["choices"][0]["delta"] == {"role": "assistant"}


def test_a_text_stream_counts_the_characters_of_each_choice() -> None:
    chunks = Chunks(TEXT, "m", GENERATION)
    made = [read(chunks.of(item))["choices"][0] for item in (
        Piece(0, "Zü\ufffd", (0, 1), TOKENS), Piece(1, "b", (0,), TOKENS[:1]), Piece(0, "c", (0,)),
        Piece(0, "Zü", (0,), TOKENS[:1]), FIRST)]
    assert [choice["text"] for choice in made] == ["Zü\ufffd", "b", "c", "Zü", ""]
    assert [choice["logprobs"] and choice["logprobs"]["text_offset"] for choice in made] == [[0, 2], [0], None, [3], None]
    assert [choice["finish_reason"] for choice in made] == [None, None, None, None, "stop"] and "speculative" not in made[-1]
    assert read(chunks.of(SECOND))["object"] == "text_completion"


def test_events() -> None:
    assert event({"a": 1}) == 'data: {"a": 1}\n\n' and DONE == "data: [DONE]\n\n"
