"""What a request to the endpoint may hold, what becomes of each field, and what refusals say."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from hydra_core.sampling.request import MOST_LOGPROBS
from pipelines.serve.messages import Generation, Refusal
from pipelines.serve.openai.errors import ApiError, closing, not_ready, printable, queue_full, refused, too_slow
from pipelines.serve.openai.requests import (
    IGNORED,
    LONGEST_STOP,
    MOST_STOP_IDS,
    MOST_STOPS,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
)

LIMIT, DEFAULT, MOST = 30, 16, 4


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "x", **fields})


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


def generation(**fields: Any) -> Generation:
    return completion(**fields).generation("cmpl", LIMIT, DEFAULT, MOST)


def test_what_is_left_out_or_null_takes_openais_defaults() -> None:
    fields = [name for name in CompletionRequest.model_fields if name not in ("model", "prompt")]
    for made in (generation(), generation(**dict.fromkeys(fields))):
        assert made == Generation(made.id, DEFAULT, temperature=1.0, seed=made.seed)
        assert re.fullmatch(r"cmpl-[0-9a-f]{32}", made.id) and 0 <= made.seed < 2**63
    first, second = generation(), generation()
    assert first.id != second.id and first.seed != second.seed
    assert len({generation().seed >> 60 for _ in range(60)}) > 3  # the upper bits are drawn too


@pytest.mark.parametrize(("field", "value", "where", "wanted"), [
    ("temperature", 0.5, "temperature", 0.5), ("temperature", 0, "temperature", 0.0), ("top_p", 0.25, "top_p", 0.25),
    ("presence_penalty", 1.5, "presence_penalty", 1.5), ("frequency_penalty", -2, "frequency_penalty", -2.0),
    ("seed", 0, "seed", 0), ("seed", -5, "seed", -5), ("n", 3, "n", 3), ("n", MOST, "n", MOST), ("stop", "a", "stop", ("a",)),
    ("stop", ["a", "b"], "stop", ("a", "b")), ("max_tokens", 1, "max_new_tokens", 1),
    ("max_tokens", LIMIT, "max_new_tokens", LIMIT),
    ("logprobs", 0, "logprobs", 0), ("logprobs", MOST_LOGPROBS, "logprobs", MOST_LOGPROBS),
    ("top_p", 1e-9, "top_p", 1e-9), ("top_k", 7, "top_k", 7), ("top_k", -1, "top_k", 0), ("min_p", 0.1, "min_p", 0.1),
    ("repetition_penalty", 1.2, "repetition_penalty", 1.2), ("stop_token_ids", [3, 4], "stop_ids", (3, 4)),
    ("ignore_eos", True, "ignore_eos", True), ("speculative", "off", "speculative", "off"),
    ("speculative", "lossy-typical", "speculative", "lossy-typical")])
def test_every_field_arrives(field: str, value: Any, where: str, wanted: Any) -> None:
    """And changes nothing else."""
    made = generation(**{"seed": 9, field: value})
    others = {"max_new_tokens": DEFAULT, "temperature": 1.0, "seed": 9, "stop": (), "n": 1, "top_p": 1.0, "presence_penalty": 0.0,
              "frequency_penalty": 0.0, "logprobs": None, "speculative": "drafter", "top_k": 0, "min_p": 0.0,
              "repetition_penalty": 1.0, "stop_ids": (), "ignore_eos": False, "arrived": None, "seconds": None}
    assert {name: getattr(made, name) for name in others} == others | {where: wanted}


@pytest.mark.parametrize(("fields", "param", "told"), [
    ({"max_tokens": 0}, "max_tokens", "max_tokens: must lie between 1 and 30, got 0"),
    ({"max_tokens": LIMIT + 1}, "max_tokens", "got 31"),
    ({"n": MOST + 1}, "n", "n: at most 4 answers to one request, got 5"),
    ({"temperature": 5e-5}, "temperature", "0 or at least 0.0001"),
    ({"temperature": float("nan")}, "temperature", ""), ({"stop": ""}, "stop", "none of them empty"),
    ({"stop": ["a", ""]}, "stop", "empty"),
    ({"stop": ["a"] * (MOST_STOPS + 1)}, "stop", "at most 4 strings"),
    ({"stop": "s" * (LONGEST_STOP + 1)}, "stop", "at most 256 characters")])
def test_refused_by_the_name_of_the_field(fields: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises((ApiError, ValidationError)) as caught:
        generation(**fields)
    if isinstance(caught.value, ApiError):
        assert (caught.value.status, caught.value.param) == (400, param) and told in caught.value.message
    else:
        assert caught.value.errors()[0]["loc"] == (param,)


def test_limits_of_stops_from_inside() -> None:
    assert generation(stop=["s" * LONGEST_STOP] * MOST_STOPS).stop == ("s" * LONGEST_STOP,) * MOST_STOPS


@pytest.mark.parametrize(("field", "good", "bad"), [
    ("n", (1,), (0, 1.0, "1")), ("temperature", (0, 100), (-0.1, 100.1, "1")), ("top_p", (0, 1e-9, 1), (-0.1, 1.01)),
    ("top_k", (-1, 0, 2**31), (-2, 1.5)), ("min_p", (0, 1), (-0.1, 1.1)), ("repetition_penalty", (0.01, 100), (0, 0.001, 101)),
    ("stop_token_ids", ([], [1] * MOST_STOP_IDS), ([1] * (MOST_STOP_IDS + 1), ["a"])), ("ignore_eos", (True,), ("yes", 1)),
    ("presence_penalty", (-2, 2), (-2.1, 2.1)), ("frequency_penalty", (-2, 2), (-2.1, 2.1)),
    ("seed", (-2**63, 2**63 - 1), (-2**63 - 1, 2**63)),
    ("logprobs", (0, MOST_LOGPROBS), (-1, MOST_LOGPROBS + 1)), ("speculative", ("off",), ("on",)),
    ("prompt", ("", [1, 2], ["a"], [[1, 2]]), (5, [1.5], None, ["a", "b"], [[1], [2]], [[["a"]]], [True], {"a": 1}, ["a", 5])),
    ("stream_options", ({}, {"include_usage": True, "other": 1}), ({"include_usage": 1}, "x")),
    ("stream", (True, None), ("yes", 1))])
def test_types_and_limits_of_each_field(field: str, good: tuple[Any, ...], bad: tuple[Any, ...]) -> None:
    for value in good:
        completion(**{field: value})
    for value in bad:
        with pytest.raises(ValidationError) as caught:
            completion(**{field: value})
        assert {error["loc"][0] for error in caught.value.errors()} == {field}


@pytest.mark.parametrize("prompt", [["a"], [[5, 6]]])
def test_a_list_of_one_prompt_is_that_prompt(prompt: list[Any]) -> None:
    assert completion(prompt=prompt).prompt == prompt[0]
    with pytest.raises(ValidationError, match="one prompt a request: a text, or a list of token ids"):
        completion(prompt=prompt * 2)


def test_a_top_p_of_nothing_is_greedy() -> None:
    made = generation(top_p=0, temperature=0.8)
    assert (made.temperature, made.top_p) == (0.0, 1.0)


def test_messages_may_not_be_empty() -> None:
    with pytest.raises(ValidationError, match="messages"):
        chat(messages=[])


@pytest.mark.parametrize(("fields", "wanted"), [
    ({}, None), ({"logprobs": False}, None), ({"top_logprobs": 0}, None), ({"logprobs": False, "top_logprobs": 0}, None),
    ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 0}, 0),
    ({"logprobs": True, "top_logprobs": 5}, 5)])
def test_log_probabilities_of_chats(fields: dict[str, Any], wanted: int | None) -> None:
    assert chat(**fields).wanted_logprobs() == wanted
    assert chat(**fields).generation("c", LIMIT, DEFAULT, MOST).logprobs == wanted


@pytest.mark.parametrize("fields", [{"top_logprobs": 2}, {"top_logprobs": 2, "logprobs": False}])
def test_the_top_needs_log_probabilities(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="needs logprobs=true") as caught:
        chat(**fields).wanted_logprobs()
    assert (caught.value.status, caught.value.param) == (400, "top_logprobs")


def test_the_newer_name_of_the_limit_wins_and_is_named() -> None:
    assert chat(max_tokens=3).generation("c", LIMIT, DEFAULT, MOST).max_new_tokens == 3
    assert chat(max_tokens=3, max_completion_tokens=5).generation("c", LIMIT, DEFAULT, MOST).max_new_tokens == 5
    with pytest.raises(ApiError) as caught:
        chat(max_completion_tokens=99).generation("c", LIMIT, DEFAULT, MOST)
    assert caught.value.param == "max_completion_tokens" and caught.value.message.startswith("max_completion_tokens: ")
    assert generation(max_tokens=None).max_new_tokens == DEFAULT
    assert completion().generation("c", 7, DEFAULT, MOST).max_new_tokens == 7  # the default is no more than the limit


def test_messages_in_the_normal_form() -> None:
    assert chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]).plain_messages() == [
        {"role": "user", "content": "hi"}]
    with pytest.raises(ApiError) as caught:
        chat(messages=[{"role": "user", "content": "a"}, {"role": "nobody", "content": "x"}]).plain_messages()
    assert (caught.value.status, caught.value.param) == (400, "messages") and caught.value.message.startswith("messages[1]")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_parameters_may_have_the_values_that_do_nothing(name: str) -> None:
    for harmless in UNSUPPORTED[name]:
        completion(**{name: harmless}).refuse_unsupported()
    completion(**{name: None}).refuse_unsupported()
    for value in ("x" * 99, 7, {"type": "json_object"}, ["tool"], 1.5):
        with pytest.raises(ApiError) as caught:
            completion(**{name: value}).refuse_unsupported()
        error = caught.value
        assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
        assert error.message == f"{name}={str(value)[:60]!r} is not supported here: leave it out"
    with pytest.raises(ApiError):  # 0 and 1 are no booleans here
        completion(echo=0).refuse_unsupported()


def test_unknown_parameters_are_named_and_ignored_ones_are_not() -> None:
    completion(reasoning_effort=None, guided_json=None).refuse_unsupported()  # as clients fill in what they know
    completion(**dict.fromkeys(IGNORED, "x")).refuse_unsupported()
    with pytest.raises(ApiError) as caught:
        completion(**{IGNORED[0]: "x", "temprature": 1}).refuse_unsupported()
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "temprature", "unknown_parameter")
    assert caught.value.message == "'temprature': unknown parameter: leave it out"


@pytest.mark.parametrize(("options", "wanted"), [(None, False), ({}, False), ({"include_usage": False}, False),
                                                 ({"include_usage": True}, True)])
def test_usage_on_request(options: Any, wanted: bool) -> None:
    assert completion(stream_options=options).include_usage is wanted


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (401, "authentication_error"),
                                              (404, "invalid_request_error"),
                                              (429, "rate_limit_error"), (499, "invalid_request_error"), (500, "server_error"),
                                              (503, "server_error")])
def test_the_body_of_an_error(status: int, kind: str) -> None:
    assert ApiError(status, "what \ud800", "p\udfff", "c", {"A": "b"}).body() == {
        "error": {"message": "what ?", "type": kind, "param": "p?", "code": "c"}}
    bare = ApiError(status, "what")
    assert bare.body()["error"]["param"] is None and bare.body()["error"]["code"] is None and bare.headers == {}
    assert str(bare) == "what" and ApiError(status, "w", headers={"A": "b"}).headers == {"A": "b"}


def test_long_messages_are_cut() -> None:
    assert printable("x" * 500) == "x" * 500 and printable("x" * 501) == "x" * 497 + "..." and len(printable("ü" * 999)) == 500


def test_refusals_of_replicas() -> None:
    full, starting = queue_full(7), not_ready("no replica")
    assert (full.status, full.code, full.headers) == (429, "queue_full",
                                                      {"Retry-After": "1"}) and full.message.startswith("7 answers are")
    assert (starting.status, starting.code, starting.headers) == (503, "not_ready", {"Retry-After": "1"})
    assert starting.message == "no replica: try again later"
    for status, code in ((503, "not_ready"), (429, "queue_full")):
        error = refused(Refusal(status, "why"))
        assert (error.status, error.message, error.code, error.headers, error.param) == (status, "why", code,
                                                                                         {"Retry-After": "1"}, None)
    assert refused(Refusal(429, "why"), 17).headers == queue_full(7, 17).headers == {"Retry-After": "17"}
    late = refused(Refusal(504, "the answer was not complete: ask for less"))
    assert (late.status, late.code, late.param) == (504, "timeout", None)
    assert (too_slow(3).status, closing().status) == (504, 503)
    for words in ("prompt: 9 tokens leave no room in a context of 8", "prompt: 99 tokens are more than the 8 here",
                  "prompt: 99 characters are more than the 8 tokens allowed here can hold"):
        error = refused(Refusal(400, words))
        assert (error.status, error.param, error.code, error.headers) == (400, "prompt", "context_length_exceeded", {})
    other = refused(Refusal(400, "top_k: must be 0 or more"))
    assert (other.param, other.code, other.message) == ("top_k", None, "top_k: must be 0 or more")
    assert refused(Refusal(400, "")).param is None
