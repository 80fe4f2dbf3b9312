"""A running application with keys: every parameter, many at once, clients that leave, metrics."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import ray
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from hydra_core.base import Base
from hydra_core.decoding import naive_generate
from hydra_core.sampling import Request, choices
from pipelines.serve.metrics import series
from pipelines.serve.served_app import ServedApp
from tests.pipelines.serve.clients import KEY, LONG, MODEL, UNSEEN, expected, load_now, log_lines, scraped, until
from tests.trained import random_prompts

pytestmark = pytest.mark.slow
def test_several_answers_whole_and_streamed(client: openai.OpenAI, tiny_base: Base) -> None:
    ids = tuple(tiny_base.tokenizer("hello").input_ids)
    wanted = [tiny_base.decode(naive_generate(tiny_base, request).token_ids)
              for request in choices(Request("x", ids, 20, 0.9, 7, top_p=0.8, presence_penalty=0.5, frequency_penalty=0.25), 2)]
    assert wanted[0] != wanted[1]
    asked: dict[str, Any] = dict(model=MODEL, prompt="hello", max_tokens=20, temperature=0.9, seed=7, top_p=0.8, n=2,
                                 presence_penalty=0.5, frequency_penalty=0.25)
    whole = client.completions.create(**asked)
    assert [choice.text for choice in whole.choices] == wanted and [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None and whole.usage.prompt_tokens == len(ids)
    texts = ["", ""]
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == wanted and chunks[-1].usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_log_probabilities(client: openai.OpenAI, tiny_base: Base) -> None:
    ids = tuple(tiny_base.tokenizer("hello").input_ids)
    wanted = naive_generate(tiny_base, Request("x", ids, 12, logprobs=3)).logprobs
    assert wanted is not None
    asked: dict[str, Any] = dict(model=MODEL, prompt="hello", max_tokens=12, temperature=0, logprobs=3)
    found = client.completions.create(**asked).choices[0].logprobs
    assert found is not None and found.token_logprobs == pytest.approx([one.logprob for one in wanted], abs=1e-4)
    streamed: list[float] = []
    for chunk in client.completions.create(stream=True, **asked):
        streamed += chunk.choices[0].logprobs.token_logprobs if chunk.choices[0].logprobs else []
    assert streamed == pytest.approx(found.token_logprobs, abs=1e-6)
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=5, temperature=0,
                                          logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob for token in content)
    assert len(content) == chat.usage.completion_tokens


def test_speculation_may_be_turned_off_and_is_told(client: openai.OpenAI, tiny_base: Base) -> None:
    told = {}
    for mode in ("drafter", "off", "lossy-typical"):
        found = client.completions.create(model=MODEL, prompt="hello", max_tokens=40, temperature=0,
                                          extra_body={"speculative": mode})
        told[mode] = found.usage.model_extra["speculative"]
        assert told[mode]["mode"] == mode
        if mode != "lossy-typical":
            assert found.choices[0].text == expected(tiny_base, "hello", 40)
    assert told["off"]["drafted"] == 0 and told["off"]["steps"] == 39
    assert told["drafter"]["drafted"] > 0
    assert told["drafter"]["steps"] + told["drafter"]["accepted"] == 39
    with pytest.raises(openai.BadRequestError, match="speculative"):
        client.completions.create(model=MODEL, prompt="hello", extra_body={"speculative": "sometimes"})


def test_sixty_four_at_once_each_equal_to_its_lone_run(client: openai.OpenAI, tiny_base: Base) -> None:
    draw = random.Random(0)
    asked = []
    for i in range(64):
        asked.append(dict(prompt=f"{i} " + "word " * draw.randrange(12), max_tokens=draw.randrange(1, 40), seed=i,
                          temperature=draw.choice([0, 0.7, 1]), top_p=draw.choice([1, 0.9]),
                          presence_penalty=draw.choice([0, 0.5])))
    modes = [draw.choice(["off", "drafter"]) for _ in asked]

    def ask(i: int) -> str:
        if i % 2:
            return "".join(chunk.choices[0].text for chunk in client.completions.create(
                model=MODEL, stream=True, extra_body={"speculative": modes[i]}, **asked[i]))
        return client.completions.create(model=MODEL, extra_body={"speculative": modes[i]}, **asked[i]).choices[0].text

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, range(64)))
    for i, one in enumerate(asked):
        settings = {name: value for name, value in one.items() if name not in ("prompt", "max_tokens")}
        assert found[i] == expected(tiny_base, str(one["prompt"]), int(one["max_tokens"]), **settings), one


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(http: httpx.Client, stream: bool) -> None:
    """It leaves while its answers wait behind others': had nobody told the engine, they would be decoded in the end."""
    mark = f"left-{stream}"
    body = json.dumps(LONG | {"stream": stream, "n": 4}).encode()
    address = urlsplit(str(http.base_url))
    head = (f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
            f"X-Request-ID: {mark}\r\nContent-Length: {len(body)}\r\n\r\n").encode()
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(http.post, "/v1/completions", json=LONG | {"n": 4, "seed": i}) for i in range(6)]
        until(lambda: load_now()["running"] == 4, "the rows are not full")
        with contextlib.closing(socket.create_connection((address.hostname, address.port))) as gone:
            gone.sendall(head + body)
            until(lambda: load_now()["in_flight"] == 28 or all(other.done() for other in others), "not seen")
        assert {other.result().status_code for other in others} == {200}

    def mine(message: str) -> int:
        return sum(line.get("request_id") == mark and line["message"] == message for line in log_lines())

    until(lambda: mine("cancelled") == 4, f"{mine('cancelled')} of 4 answers were given up")
    assert mine("answered") == 0
    until(lambda: load_now()["in_flight"] == load_now()["running"] == 0, "rows are held")


def test_a_full_queue_is_told_to_come_back(http: httpx.Client) -> None:
    with ThreadPoolExecutor(80) as pool:
        found = list(pool.map(lambda i: http.post("/v1/completions", json=LONG | {"n": 4, "seed": i}), range(40)))
    assert {answer.status_code for answer in found} == {200, 429}
    full = next(answer for answer in found if answer.status_code == 429)
    assert 1 <= int(full.headers["retry-after"]) <= 60
    assert (full.json()["error"]["type"], full.json()["error"]["code"]) == ("rate_limit_error", "queue_full")
    until(lambda: http.get("/ready").json()["in_flight"] == 0, "rows are held")


HOSTILE: list[tuple[bytes, int]] = [
    (b"x" * 60_000, 413), (b"{", 400), (b"", 400), (b"null", 400), (b"[]", 400), (b"[" * 40_000, 400), (b"\xff\xfe", 400),
    (json.dumps(LONG | {"max_tokens": 10**9}).encode(), 400), (json.dumps(LONG | {"max_tokens": "many"}).encode(), 400),
    (json.dumps(LONG | {"temperature": float("nan")}).encode(), 400), (json.dumps(LONG | {"seed": 2**80}).encode(), 400),
    (json.dumps(LONG | {"temperature": 1e-9}).encode(), 400), (json.dumps(LONG | {"temperature": 1e400}).encode(), 400),
    (json.dumps(LONG | {"model": "\x00" * 999}).encode(), 404), (json.dumps(LONG | {"prompt": {"a": 1}}).encode(), 400),
    (json.dumps(LONG | {"prompt": [10**30]}).encode(), 400), (json.dumps(LONG | {"n": 10**9}).encode(), 400),
    (json.dumps(LONG | {"stop": [["a"]]}).encode(), 400), (json.dumps(LONG | {"\ud800": 1}).encode(), 400),
    (json.dumps(LONG | {"prompt": "w" * 5000}).encode(), 400),
    (json.dumps(LONG | {"prompt": "w" * 191, "max_tokens": 3}).encode(), 400),
    (json.dumps(LONG | {"prompt": "w" * 190, "max_tokens": 3}).encode(), 200),
    (json.dumps(LONG | {"stream": "yes"}).encode(), 400),
    (json.dumps(LONG | {"stop": "s" * 40_000}).encode(), 400), (json.dumps(LONG | {"echo": True}).encode(), 400),
    (json.dumps(LONG | {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "max_tokens": 3}).encode(), 200),
    (json.dumps(LONG | {"repetition_penalty": 1e-300}).encode(), 400), (json.dumps(LONG | {"top_k": -5}).encode(), 400),
    (json.dumps(LONG | {"stop_token_ids": [10**30]}).encode(), 400), (json.dumps(LONG | {"suffix": "x"}).encode(), 400),
    (json.dumps(LONG | {"prompt": "\x00\x1b[2J\u202e\x7f", "max_tokens": 3}).encode(), 200)]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_requests(http: httpx.Client, number: int) -> None:
    body, status = HOSTILE[number]
    answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    if status != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert "Traceback" not in answer.text and len(answer.text) < 2000


def test_slow_clients_hold_nobody_up(http: httpx.Client, client: openai.OpenAI) -> None:
    address = urlsplit(str(http.base_url))
    slow = [socket.create_connection((address.hostname, address.port)) for _ in range(8)]
    for one in slow:
        one.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 1000\r\n\r\n{{"
                    .encode())
    assert client.completions.create(model=MODEL, prompt="hello", max_tokens=3).choices
    for one in slow:
        one.close()


def test_keys(app: ServedApp, http: httpx.Client) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong-key-0123456789"}, {"Authorization": KEY}):
        answer = httpx.post(f"{app.url}/v1/completions", json=LONG, headers=headers, timeout=30)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{app.url}/v1/models", headers=headers, timeout=30).status_code == 401
    assert httpx.get(f"{app.url}/health", timeout=30).json() == {"status": "ok"}
    logs = list(Path(ray._private.worker._global_node.get_logs_dir_path()).rglob("*"))
    assert not any(KEY in path.read_text(errors="replace") for path in logs if path.is_file())


def test_unknown_paths_and_methods_in_openais_shape(http: httpx.Client) -> None:
    assert (http.get("/v1/nothing").status_code, http.get("/v1/completions").status_code) == (404, 405)
    assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_logs_are_json_with_request_ids(http: httpx.Client) -> None:
    found = http.post("/v1/completions", json=LONG | {"max_tokens": 2}, headers={"X-Request-ID": "my-own-id"}).json()
    until(lambda: any(line.get("answer_id") == found["id"] for line in log_lines()), "the answer is not in the log")
    mine = [line for line in log_lines() if line.get("request_id") == "my-own-id"]
    assert {line["message"] for line in mine} >= {"answered", "request"}
    assert not any("hello" in json.dumps(line) for line in mine)  # prompts are nobody's business


def test_metrics_can_be_scraped(http: httpx.Client) -> None:
    for prompt in 2 * random_prompts(4, seed=1):  # on which the heads were trained, so that drafts stand; known the second time
        http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 40, "temperature": 0})
    scraped(series() - UNSEEN)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
def test_whatever_its_description_allows_or_forbids(app: ServedApp, mode: GenerationMode) -> None:
    """No 5xx, no hang, for bodies drawn from the OpenAPI description, and for those that break it."""
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{app.url}/openapi.json", headers=headers)
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.method.upper() != "POST":
            continue

        @given(case=operation.as_strategy(generation_mode=mode), ours=st.booleans())
        @settings(max_examples=60, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        def fuzz(case: Any, ours: bool) -> None:
            if ours and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = MODEL  # else hardly any gets further than a model that nobody knows
            answer = case.call(base_url=app.url, headers=headers, timeout=60)
            assert answer.status_code < 500, answer.text

        fuzz()
