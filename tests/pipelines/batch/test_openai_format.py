"""A row as a request to the engine and over HTTP, and an answer as a line of OpenAI's Batch format."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.batch.openai_format import CHAT, COMPLETION, generation_of, output_line, request_of, row_seed
from pipelines.batch.reader import BatchRow
from pipelines.rows.schemas import content_id
from pipelines.serve.messages import Generation
from pipelines.serve.openai.errors import ApiError

MESSAGES = [{"role": "user", "content": "hi"}]


def asked(row: BatchRow) -> Generation:
    return generation_of(row, "m", 50, 0.5, 7, 4)


def test_a_row_of_a_prompt_file_is_asked_with_the_settings_of_the_job() -> None:
    seed = row_seed(7, "a")
    assert asked(BatchRow("a", 1, "hi")) == Generation("batch-a", 50, 0.5, seed, prompt="hi")
    assert asked(BatchRow("a", 1, None, MESSAGES)) == Generation("batch-a", 50, 0.5, seed, messages=MESSAGES)
    # what was encoded already is not encoded again
    assert asked(BatchRow("a", 1, "hi", None, [3, 4])) == Generation("batch-a", 50, 0.5, seed, prompt_ids=[3, 4])
    assert asked(BatchRow("a", 1, "hi", MESSAGES)).prompt is None


def test_a_row_over_http_says_the_same() -> None:
    settings = {"model": "m", "max_tokens": 50, "temperature": 0.5, "seed": row_seed(7, "a")}
    for row, path, given in ((BatchRow("a", 1, "hi"), CHAT, {"messages": MESSAGES}),
                             (BatchRow("a", 1, None, MESSAGES), CHAT, {"messages": MESSAGES}),
                             (BatchRow("a", 1, "hi", None, [3, 4]), COMPLETION, {"prompt": [3, 4]})):
        assert request_of(row, "m", 50, 0.5, 7) == (path, settings | given)
    body = {"prompt": "hi", "stream": True, "stream_options": {}, "top_p": None, "temperature": 0.25}
    assert request_of(BatchRow("a", 1, url=COMPLETION, body=body), "m", 50, 0.5, 7) == (
        COMPLETION, {"model": "m", "seed": row_seed(7, "a"), "prompt": "hi", "temperature": 0.25, "max_tokens": 50})


@pytest.mark.parametrize(("body", "limit"), [
    ({}, 50), ({"max_tokens": 9}, 9), ({"max_completion_tokens": 8}, 8), ({"max_tokens": 90}, 90),
    ({"max_completion_tokens": 90}, 90), ({"max_tokens": None}, 50)])
def test_a_request_has_its_own_settings_and_those_of_the_job_where_it_has_none(body: dict[str, Any], limit: int) -> None:
    found = asked(BatchRow("a", 1, url=CHAT, body={"messages": MESSAGES, **body}))
    assert (found.id, found.max_new_tokens, found.seed, found.messages) == ("batch-a", limit, row_seed(7, "a"), MESSAGES)
    mine = {"seed": 3, "temperature": 0.25, "model": "m", "n": 4}
    own = asked(BatchRow("a", 1, url=CHAT, body={"messages": MESSAGES, **mine, **body}))
    assert (own.seed, own.temperature, own.max_new_tokens) == (3, 0.25, limit)


def test_texts_and_tokens_of_a_completion() -> None:
    text = asked(BatchRow("a", 1, url=COMPLETION, body={"prompt": "hi"}))
    ids = asked(BatchRow("a", 1, url=COMPLETION, body={"prompt": [3, 4]}))
    assert (text.text, text.prompt_ids, text.messages) == ("hi", None, None)
    assert (ids.text, ids.prompt_ids, ids.messages) == (None, [3, 4], None)


@pytest.mark.parametrize(("url", "body", "status", "param", "told"), [
    (CHAT, {"messages": MESSAGES, "model": "x"}, 404, "model", "model 'x' does not exist; 'm' does"),
    (CHAT, {"messages": 3}, 400, "messages", "messages: "), (CHAT, {}, 400, "messages", "messages: Field required"),
    (COMPLETION, {"prompt": ""}, 400, "prompt", "prompt: is empty"),
    (COMPLETION, {"prompt": []}, 400, "prompt", "prompt: is empty"),
    (COMPLETION, {"prompt": "hi", "max_tokens": "x"}, 400, "max_tokens", "max_tokens: "),
    (CHAT, {"messages": MESSAGES, "n": 5}, 400, "n", "n")])
def test_what_the_endpoint_would_refuse_is_refused(url: str, body: dict[str, Any], status: int, param: str, told: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(BatchRow("a", 1, url=url, body=body))
    assert (caught.value.status, caught.value.param) == (status, param) and caught.value.message.startswith(told)


def test_seeds_differ_by_row_and_stay_within_63_bits() -> None:
    assert row_seed(7, "a") - row_seed(0, "a") == 7 and row_seed(0, "a") != row_seed(0, "b")
    assert row_seed(0, "a") == int(content_id("batch", "a")[:8], 16)
    assert row_seed(2**63 - 1, "a") == row_seed(0, "a") - 1 and row_seed(2**63, "a") == row_seed(0, "a")


def test_lines_of_answers_and_errors() -> None:
    name = content_id("batch", "a")
    assert output_line("a", 200, {"x": 1}) == {
        "id": f"batch_req_{name}", "custom_id": "a", "error": None,
        "response": {"status_code": 200, "request_id": f"req_{name}", "body": {"x": 1}}}
    assert output_line("a", 400, None, "bad") == {
        "id": f"batch_req_{name}", "custom_id": "a", "error": {"code": "status_400", "message": "bad"},
        "response": {"status_code": 400, "request_id": f"req_{name}", "body": {}}}
    bad = content_id("batch", "bad row", 3)
    assert output_line("a", 0, None, "no", bad_row=3) == {
        "id": f"batch_req_{bad}", "custom_id": "a", "response": None, "error": {"code": "invalid_row", "message": "no"}}
    assert output_line("a", 0, None, "no", bad_row=4)["id"] != output_line("a", 0, None, "no", bad_row=3)["id"]
