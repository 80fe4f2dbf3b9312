"""A running application with keys: every parameter, many at once, clients that leave, metrics, and other heads live."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest
import ray
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from hydra_core.base import Base
from hydra_core.checkpoint import save_checkpoint
from hydra_core.decoding import DecodingConfiguration, Request, choices, naive_generate, save_configuration
from hydra_core.errors import InputError
from hydra_core.tree import Tree, TreeSet
from pipelines.config import RunConfig, load_config
from pipelines.serve import ServedApp, resolve_args, run_serve, start_app, update_app
from pipelines.serving.metrics import series
from pipelines.tracking import Tracker, register
from tests.pipelines.test_serve import free_port
from tests.processes import children
from tests.trained import overfit_heads, random_prompts

pytestmark = pytest.mark.slow
TREE = Tree(((0,), (1,), (0, 0), (0, 0, 0)))
KEY = "a-key-of-this-test-0123456789"
MODEL = "hydra-heads"


@pytest.fixture(scope="module")
def configuration(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configuration")
    heads = overfit_heads(tiny_base, "hydra++", random_prompts(4, seed=1))
    save_checkpoint(root / "heads", heads, tiny_base.identity, TreeSet({1: TREE, 4: TREE}), {})
    save_configuration(root / "it", DecodingConfiguration("hydra++", "heads", tiny_base.identity, heads=root / "heads"))
    return root / "it"


@pytest.fixture(scope="module")
def config(tiny_base_dir: Path, configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# of this test\n{KEY}\n", encoding="utf-8")
    return load_config(None, {
        "storage": str(tmp_path_factory.mktemp("storage")), "base.model": str(tiny_base_dir), "base.dtype": "fp32",
        "serve.model": str(configuration), "serve.port": free_port(), "serve.max_batch": 4, "serve.max_queued": 60,
        "serve.max_new_tokens": 200, "serve.max_body_bytes": 50_000, "serve.max_prompt_tokens": 190,
        "serve.api_keys_file": str(keys),
        "serve.workers.threads": 1})


@pytest.fixture(scope="module")
def app(local_ray: None, config: RunConfig) -> Iterator[ServedApp]:
    served = start_app(config)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def client(app: ServedApp) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def http(app: ServedApp) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as found:
        yield found


def expected(base: Base, prompt: str, tokens: int, **settings: Any) -> str:
    ids = tuple(base.tokenizer(prompt).input_ids)
    return base.decode(naive_generate(base, Request("x", ids, tokens, **settings)).token_ids)


def until(true: Callable[[], bool], what: str) -> None:
    for _ in range(300):
        if true():
            return
        time.sleep(0.1)
    pytest.fail(what)


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


LONG = {"model": MODEL, "prompt": "hello", "max_tokens": 200, "temperature": 1.0, "seed": 3}


def log_lines() -> list[dict[str, Any]]:
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    return [json.loads(line) for path in folder.glob("replica_hydra-heads_*.log") for line in path.read_text().splitlines()]


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
        until(lambda: http.get("/ready").json()["running"] == 4, "the rows are not full")
        with contextlib.closing(socket.create_connection((address.hostname, address.port))) as gone:
            gone.sendall(head + body)
            until(lambda: http.get("/ready").json()["in_flight"] == 28 or all(other.done() for other in others), "not seen")
        assert {other.result().status_code for other in others} == {200}

    def mine(message: str) -> int:
        return sum(line.get("request_id") == mark and line["message"] == message for line in log_lines())

    until(lambda: mine("cancelled") == 4, f"{mine('cancelled')} of 4 answers were given up")
    assert mine("answered") == 0
    assert http.get("/ready").json()["in_flight"] == http.get("/ready").json()["running"] == 0


def test_a_full_queue_is_told_to_come_back(http: httpx.Client) -> None:
    with ThreadPoolExecutor(80) as pool:
        found = list(pool.map(lambda i: http.post("/v1/completions", json=LONG | {"n": 4, "seed": i}), range(40)))
    assert {answer.status_code for answer in found} == {200, 429}
    full = next(answer for answer in found if answer.status_code == 429)
    assert full.headers["retry-after"] == "1"
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
    (json.dumps(LONG | {"top_k": 5}).encode(), 400), (json.dumps(LONG | {"suffix": "x"}).encode(), 400),
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


def scraped(names: set[str]) -> None:
    """Wait until Ray's exporter tells every one of `names`, whole."""
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    absent = names
    for _ in range(60):
        told = {re.split(r"[{ ]", line, maxsplit=1)[0] for line in httpx.get(address, timeout=60).text.splitlines()}
        if not (absent := names - told):
            return
        time.sleep(0.5)
    pytest.fail(f"not told: {sorted(absent)}")


REJECTED, CANCELLED = "ray_hydra_heads_rejected_total", "ray_hydra_answers_cancelled_total"


def test_metrics_can_be_scraped(http: httpx.Client) -> None:
    for prompt in random_prompts(4, seed=1):  # on which the heads were trained, so that drafts stand
        http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 40, "temperature": 0})
    scraped(series() - {REJECTED, CANCELLED})


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


def replicas() -> set[int]:
    """Process ids of what decodes."""
    return {child.pid for child in children("ServeReplica:hydra-heads:DecodeServer")}


def test_other_heads_while_it_runs(client: openai.OpenAI, http: httpx.Client, config: RunConfig, configuration: Path,
                                   tiny_base: Base, tmp_path: Path) -> None:
    save_configuration(tmp_path / "ngram", DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    other = config.model_copy(update={"serve": config.serve.model_copy(update={"model": str(tmp_path / "ngram")})})
    stop, failed, asked, stood = threading.Event(), [], [], replicas()
    wanted = [expected(tiny_base, "hello", 60, temperature=1.0, seed=i) for i in range(5)]

    def ask() -> None:
        while not stop.is_set():
            i = len(asked) % 5
            asked.append(i)
            try:
                given: dict[str, Any] = dict(model=MODEL, prompt="hello", max_tokens=60, temperature=1.0, seed=i)
                if i % 2:
                    text = "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **given))
                else:
                    text = client.completions.create(**given).choices[0].text
                if text != wanted[i]:
                    failed.append(text)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    update_app(resolve_args(other))
    before = len(asked)
    until(lambda: len(asked) > before + 4, "nobody is answered")
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed and len(asked) > 8 and replicas() == stood
    args = resolve_args(other)
    model = http.get("/v1/models").json()["data"][0]
    assert (model["configuration"], model["digest"]) == (str(tmp_path / "ngram"), args.digest)
    shutil.copytree(configuration, tmp_path / "bad")
    good = resolve_args(config)
    (tmp_path / "bad" / "heads" / "tree.json").unlink()
    with pytest.raises(InputError, match="was turned down"):
        update_app(dataclasses.replace(good, configuration=str(tmp_path / "bad"), label="bad"))
    ready = http.get("/ready").json()
    assert ready["label"] == str(tmp_path / "ngram") and ready["rejected"]["label"] == "bad" and ready["status"] == "ready"
    again = client.completions.create(model=MODEL, prompt="hello", max_tokens=60, temperature=1.0, seed=0)
    assert again.choices[0].text == wanted[0]
    scraped({REJECTED})
    assert any(line["message"] == "heads rejected, the old ones stay" for line in log_lines())
    update_app(good)
    assert http.get("/ready").json()["rejected"] is None and replicas() == stood


def test_an_alias_is_what_an_update_goes_by(http: httpx.Client, app: ServedApp, config: RunConfig,
                                            configuration: Path) -> None:
    with Tracker.open(config).start("promote") as run:
        run.log_artifact(configuration, "configuration")
        version = register(config, config.promote.model_name, run, "configuration", config.promote.alias, {})
    asked = config.model_copy(update={"serve": config.serve.model_copy(update={
        "model": f"models:/{config.promote.model_name}@{config.promote.alias}", "update": True})})
    result = run_serve(asked)
    assert result.figures["version"] == version and result.outputs["url"] == app.url
    model = http.get("/v1/models").json()["data"][0]
    assert model["version"] == version and model["digest"] == resolve_args(asked).digest
    other = asked.model_copy(update={"base": asked.base.model_copy(update={"dtype": "bf16"}),
                                     "serve": asked.serve.model_copy(update={"model": "plain"})})
    with pytest.raises(InputError, match="start another application for another base"):
        run_serve(other)
    update_app(resolve_args(config))


def test_a_replica_that_dies_is_told_of_and_replaced(http: httpx.Client, client: openai.OpenAI) -> None:
    """The last test here: it leaves another replica behind."""
    stood = replicas()
    body = LONG | {"n": 4}
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(http.post, "/v1/completions", json=body | {"seed": i}) for i in range(6)]
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            for pid in stood:
                psutil.Process(pid).kill()
            told = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
        assert "error" in told[-1] and told[-1]["error"]["code"] == "not_ready"
        assert {other.result().status_code for other in others} <= {200, 503}
        assert any(other.result().status_code == 503 for other in others)
    until(lambda: http.get("/ready").status_code == 200 and not stood & replicas(), "no new replica")
    assert http.get("/ready").json()["in_flight"] == 0
    assert client.completions.create(model=MODEL, prompt="hello", max_tokens=5, temperature=0).choices
