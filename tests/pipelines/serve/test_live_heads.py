"""Heads that change while an application runs, and replicas that die: nobody's answer is lost to either unseen."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError
from pipelines.config import RunConfig
from pipelines.serve.served_app import ServedApp
from pipelines.serve.stage import resolve_args, run_serve, update_app
from pipelines.tracking import Tracker, register
from tests.pipelines.serve.clients import LONG, MODEL, REJECTED, expected, load_now, log_lines, scraped, until
from tests.processes import children

pytestmark = pytest.mark.slow


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
    with pytest.raises(InputError, match="was rejected"):
        update_app(dataclasses.replace(good, configuration=str(tmp_path / "bad"), label="bad"))
    ready = http.get("/ready").json()
    assert ready["label"] == str(tmp_path / "ngram") and ready["rejected"]["label"] == "bad" and ready["status"] == "ready"
    again = client.completions.create(model=MODEL, prompt="hello", max_tokens=60, temperature=1.0, seed=0)
    assert again.choices[0].text == wanted[0]
    scraped({REJECTED})
    assert any(line["message"] == "heads rejected, the earlier ones stay" for line in log_lines())
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
    until(lambda: load_now()["in_flight"] == 0, "rows are held")
    assert client.completions.create(model=MODEL, prompt="hello", max_tokens=5, temperature=0).choices
