"""Real Serve, real HTTP, the real `openai` client, on the tiny base."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, naive_generate, save_configuration
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from pipelines.config import RunConfig, load_config
from pipelines.serve.served_app import ServedApp
from pipelines.serve.stage import build_app, resolve_args, run_serve
from tests.tiny import save_tiny
from tests.trained import overfit_heads, random_prompts

pytestmark = pytest.mark.slow
TREE = DraftTree(((0,), (1,), (0, 0), (0, 0, 0)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def configuration(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configuration")
    heads = overfit_heads(tiny_base, "hydra++", random_prompts(4, seed=1))
    save_checkpoint(root / "heads", heads, tiny_base.identity, TreeSet({1: TREE, 4: DraftTree(((0,),))}), {})
    save_configuration(root / "it", DecodingConfiguration("hydra++", "heads", tiny_base.identity, heads=root / "heads"))
    return root / "it"


@pytest.fixture(scope="module")
def config(tiny_base_dir: Path, configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_config(None, {
        "storage": str(tmp_path_factory.mktemp("storage")), "base.model": str(tiny_base_dir), "base.dtype": "fp32",
        "serve.model": str(configuration), "serve.port": free_port(), "serve.max_batch_size": 4, "serve.max_queued": 6,
        "serve.max_new_tokens": 200, "serve.workers.threads": 1})


@pytest.fixture(scope="module")
def client(app: ServedApp) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0, timeout=60)


def expected(base: Base, prompt: tuple[int, ...], tokens: int, **changes: float) -> str:
    return base.decode(naive_generate(base, Request("x", prompt, tokens, **changes)).token_ids)  # type: ignore[arg-type]


def test_models(client: openai.OpenAI, app: ServedApp) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["hydra-heads"]
    assert httpx.get(f"{app.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{app.url}/ready").json()["slots"] == 4


def test_completion_equals_naive_and_streaming_equals_it(client: openai.OpenAI, tiny_base: Base) -> None:
    for prompt in ("hello", "às ✓", "x"):
        ids = tuple(tiny_base.tokenizer(prompt).input_ids)
        wanted, tokens = expected(tiny_base, ids, 40), naive_generate(tiny_base, Request("x", ids, 40)).token_ids
        whole = client.completions.create(model="hydra-heads", prompt=prompt, max_tokens=40, temperature=0)
        assert whole.choices[0].text == wanted
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), len(tokens))
        assert whole.usage.model_extra["speculative"]["steps"] >= 1
        pieces = client.completions.create(model="hydra-heads", prompt=prompt, max_tokens=40, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == wanted


def test_chat(client: openai.OpenAI, tiny_base: Base) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    prompt = tuple(tiny_base.encode_prompt(messages=messages))
    for temperature in (0.0, 0.9):
        wanted = expected(tiny_base, prompt, 30, temperature=temperature, seed=7)
        whole = client.chat.completions.create(model="hydra-heads", messages=messages, max_completion_tokens=30,
                                               temperature=temperature, seed=7)
        assert whole.choices[0].message.content == wanted
        chunks = list(client.chat.completions.create(
            model="hydra-heads", messages=messages, max_tokens=30, temperature=temperature, seed=7, stream=True,
            stream_options={"include_usage": True}))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
        assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_stop_strings(client: openai.OpenAI, tiny_base: Base) -> None:
    whole = client.completions.create(model="hydra-heads", prompt="hello", max_tokens=60, temperature=0).choices[0].text
    stop = whole[10:13]
    found = client.completions.create(model="hydra-heads", prompt="hello", max_tokens=60, temperature=0, stop=[stop])
    assert found.choices[0].text == whole[:whole.find(stop)] and found.choices[0].finish_reason == "stop"
    pieces = client.completions.create(model="hydra-heads", prompt="hello", max_tokens=60, temperature=0, stop=stop, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole[:whole.find(stop)]


def test_concurrent_requests_equal_lone_ones(client: openai.OpenAI, tiny_base: Base) -> None:
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        found = client.completions.create(model="hydra-heads", prompt=f"number {i}", max_tokens=20 + i, temperature=i % 2, seed=i)
        answers[i] = found.choices[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(10):
        prompt = tuple(tiny_base.tokenizer(f"number {i}").input_ids)
        assert answers[i] == expected(tiny_base, prompt, 20 + i, temperature=i % 2, seed=i)


@pytest.mark.parametrize(("path", "body", "status", "param"), [
    ("completions", {"model": "nobody", "prompt": "x"}, 404, "model"),
    ("completions", {"model": "hydra-heads"}, 400, "prompt"),
    ("completions", {"model": "hydra-heads", "prompt": ""}, 400, "prompt"),
    ("completions", {"model": "hydra-heads", "prompt": []}, 400, "prompt"),
    ("completions", {"model": "hydra-heads", "prompt": [5, 99999]}, 400, "prompt"),
    ("completions", {"model": "hydra-heads", "prompt": "x" * 400}, 400, "prompt"),
    ("completions", {"model": "hydra-heads", "prompt": "half a pair: \ud800"}, 400, "prompt"),
    ("completions", {"model": "\ud800", "prompt": "x"}, 404, "model"),
    ("completions", {"model": "hydra-heads", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
    ("completions", {"model": "hydra-heads", "prompt": "x", "max_tokens": 10**9}, 400, "max_tokens"),
    ("completions", {"model": "hydra-heads", "prompt": "x", "temperature": -1}, 400, "temperature"),
    ("completions", {"model": "hydra-heads", "prompt": "x", "n": 5}, 400, "n"),
    ("completions", {"model": "hydra-heads", "prompt": "x", "top_p": -0.1}, 400, "top_p"),
    ("completions", {"model": "hydra-heads", "prompt": ["x", "y"]}, 400, "prompt"),
    ("completions", {"model": "hydra-heads", "prompt": "x", "stop_token_ids": [99999]}, 400, "stop_token_ids"),
    ("completions", {"model": "hydra-heads", "prompt": "x", "stop": ["a"] * 5}, 400, "stop"),
    ("chat/completions", {"model": "hydra-heads", "messages": []}, 400, "messages"),
    ("chat/completions", {"model": "hydra-heads", "messages": [{"role": "user"}]}, 400, "messages"),
    ("chat/completions", {"model": "hydra-heads", "messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
    ("chat/completions", {"model": "hydra-heads", "messages": [{"role": "\udfff", "content": "x"}]}, 400, "messages"),
    ("chat/completions", {"model": "hydra-heads", "messages": [{"role": "user", "content": "x"}], "tools": [1]}, 400, "tools"),
])
def test_errors_in_openais_shape(app: ServedApp, path: str, body: dict[str, object], status: int, param: str) -> None:
    for stream in (False, True):
        answer = httpx.post(f"{app.url}/v1/{path}", content=json.dumps(body | {"stream": stream}), timeout=30,
                            headers={"Content-Type": "application/json"})  # httpx itself refuses half a surrogate pair
        error = answer.json()["error"]
        assert (answer.status_code, error["param"].split(".")[0]) == (status, param), error
        assert error["type"] == "invalid_request_error" and "Traceback" not in error["message"]


def test_malformed_body(app: ServedApp) -> None:
    answer = httpx.post(f"{app.url}/v1/completions", content=b"{not json", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "error" in answer.json()


def test_bad_configurations_are_refused_before_serving(config: RunConfig, configuration: Path, tmp_path: Path) -> None:
    def serving(model: str, dtype: str = "fp32") -> RunConfig:
        return config.model_copy(update={"serve": config.serve.model_copy(update={"model": model}),
                                         "base": config.base.model_copy(update={"dtype": dtype})})

    assert resolve_args(serving("plain")).configuration is None
    for model, dtype, word in ((str(tmp_path), "fp32", "configuration"), ("models:/none@champion", "fp32", "not registered"),
                               (str(configuration), "bf16", "base")):
        with pytest.raises(InputError, match=word):
            resolve_args(serving(model, dtype))
    broken = tmp_path / "broken"
    (broken / "heads").mkdir(parents=True)
    (broken / "configuration.json").write_text((configuration / "configuration.json").read_text(), encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json"):
        resolve_args(serving(str(broken)))
    with pytest.raises(InputError, match="nonsense"):
        build_app({"nonsense": 1})
    assert json.loads((configuration / "configuration.json").read_text())["drafter"] == "heads"


def command_for(storage: Path, base: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "jobs.serve", f"storage={storage}", f"base.model={base}", "base.dtype=fp32",
            "serve.model=plain", f"serve.port={port}", "serve.workers.threads=1"]


def environment_of(worker_env: dict[str, str], **marks: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return {**kept, **worker_env, **marks}


def marked(mark: str) -> list[str]:
    """Processes that inherited the environment variable `mark`, whatever they call themselves."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in process.environ():
                found.append(" ".join(process.cmdline()))
    return found


def stop_while_it_answers(process: subprocess.Popen[str], url: str, count: int) -> list[httpx.Response]:
    """SIGTERM while `count` requests decode or wait; what came of them."""
    body = {"model": "hydra-heads", "prompt": "hello", "max_tokens": 400, "ignore_eos": True, "temperature": 1.0}
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(httpx.post, f"{url}/v1/completions", json=body | {"seed": seed}, timeout=120)
                 for seed in range(count)]
        deadline = time.monotonic() + 60
        while (httpx.get(f"{url}/ready", timeout=30).json()["accepted"] + sum(one.done() for one in asked) < count
               and time.monotonic() < deadline):
            time.sleep(0.02)  # a request that comes later is refused
        process.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{url}/ready", timeout=30)).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (ready.status_code, ready.json()["status"]) == (503, "closing")
        late = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "closing") and int(late.headers["retry-after"]) > 0
        return [one.result() for one in asked]


def test_the_command_serves_until_told_to_stop_and_finishes_what_it_accepted(storage: Path, tmp_path: Path,
                                                                             worker_env: dict[str, str]) -> None:
    from mlflow.tracking import MlflowClient

    base = save_tiny(tmp_path / "base", max_position_embeddings=1024)
    mark = f"HYDRA_TEST_{uuid.uuid4().hex}"
    log = tmp_path / "stderr"
    with log.open("wb") as errors:
        process = subprocess.Popen(command_for(storage, base, 0), env=environment_of(worker_env, **{mark: "1"}),
                                   stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while not (told := re.search(r"serve: plain answers at (\S+),", log.read_text())) and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        assert told, log.read_text()[-3000:]
        models = httpx.get(f"{told[1]}/v1/models", timeout=30).json()["data"]
        assert [(model["id"], model["configuration"]) for model in models] == [("hydra-heads", "plain")]
        assert len(marked(mark)) > 3  # Ray's processes carry it too
        assert (metrics := re.search(r"metrics for Prometheus: (\S+)", log.read_text())), log.read_text()[-3000:]
        assert httpx.get(metrics[1], timeout=60).status_code == 200
        found = stop_while_it_answers(process, told[1], 40)
        out, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 and "Traceback" not in log.read_text(), log.read_text()[-3000:]
    assert [answer.status_code for answer in found] == [200] * 40, [answer.text for answer in found if answer.status_code != 200]
    assert {answer.json()["usage"]["completion_tokens"] for answer in found} == {400}
    assert re.search(r"serve: finishing \d+ answers", log.read_text())
    assert out.count("\n") == 1
    result = json.loads(out)
    assert (result["stage"], result["outputs"]["url"], result["model"]) == ("serve", told[1], "plain")
    deadline = time.monotonic() + 30
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    seen = MlflowClient(f"sqlite:///{storage}/mlflow/mlflow.db").get_run(result["run_id"])
    assert seen.info.status == "FINISHED" and seen.data.tags["hydra_heads.stage"] == "serve"
    assert (seen.data.params["serves.label"], seen.data.params["serves.configuration"]) == ("plain", "plain")
    assert seen.data.params["base.dtype"] == "fp32" and seen.data.params["serve.max_batch_size"] == "8"


def test_told_to_stop_while_it_starts(tiny_base_dir: Path, storage: Path, tmp_path: Path, worker_env: dict[str, str]) -> None:
    """As an orchestrator does that has changed its mind: no abort, and nothing left running."""
    mark, log = f"HYDRA_TEST_{uuid.uuid4().hex}", tmp_path / "stderr"
    with log.open("wb") as errors:
        process = subprocess.Popen(command_for(storage, tiny_base_dir, 0), env=environment_of(worker_env, **{mark: "1"}),
                                   stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while "keys and values of" not in log.read_text() and time.monotonic() < deadline:  # a replica is being made
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    told = log.read_text()
    answered = "answers at" in told  # it came to that before the signal did
    assert answered or ("serve: interrupted" in told and out == ""), told[-3000:]
    assert process.returncode == (0 if answered else 1), told[-3000:]
    deadline = time.monotonic() + 30
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def test_a_port_in_use_is_the_users_mistake(tiny_base_dir: Path, storage: Path, worker_env: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(command_for(storage, tiny_base_dir, port), env=environment_of(worker_env), capture_output=True,
                              text=True, timeout=180)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"serve.port={port}: cannot be bound on 127.0.0.1" in errors[0]


def test_a_dead_tracking_server_is_told_before_ray_starts(tiny_base_dir: Path, storage: Path) -> None:
    config = load_config(None, {"storage": str(storage), "base.model": str(tiny_base_dir), "serve.model": "plain",
                                "tracking.uri": "http://127.0.0.1:9"})
    with pytest.raises(StoppedError, match=r"tracking\.uri=http://127\.0\.0\.1:9"):
        run_serve(config)
