"""Requests at a constant rate against a real application: every one accounted for, at twice its capacity too."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from hydra_core.errors import InputError
from pipelines.config import RunConfig, load_config
from pipelines.load.client import FAILED, LOST, OK, REFUSED, Sent, Target, open_loop, run
from pipelines.load.stage import run_load, summarise
from pipelines.runtime.artifacts import RunPaths
from tests.pipelines.batch.test_backends import endpoint
from tests.pipelines.serve.test_stage import free_port


def config_for(storage: Path, base: Path, prompts: Path, **changes: object) -> RunConfig:
    values = {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "serve.model": "plain",
              "serve.port": free_port(), "serve.max_batch_size": 2, "serve.max_queued": 3, "load.prompts": str(prompts),
              "load.seconds": 2.0, "load.max_new_tokens": 12, "load.capacity_requests": 8, "load.rates": [0.5, 4.0]}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def test_figures_by_hand() -> None:
    sent = [Sent(OK, 0.0, 1.0, 0.1, (0.2, 0.4), 10), Sent(OK, 1.0, 3.0, 2.0, (0.6,), 20), Sent(REFUSED, 2.0, 0.0),
            Sent(FAILED, 2.0, 0.5), Sent(LOST, 0.0, 4.0)]
    found = summarise(sent, first_token_seconds=1.0)
    assert [found[name] for name in ("sent", OK, REFUSED, FAILED, LOST)] == [5, 2, 1, 1, 1]
    assert found["tokens_per_second"] == 30 / 4 and found["goodput"] == 10 / 4
    assert found["between_pieces_p50_ms"] == 400.0 and found["first_token_p50_ms"] == 1050.0
    assert summarise(sent[2:], 1.0)["first_token_p99_ms"] is None


def test_what_becomes_of_requests() -> None:
    """A refusal, a broken answer and silence are told apart, and none is dropped."""
    with endpoint((429, {}), (500, {}), (200, {"no": "stream"})) as (address, came):
        target = Target(address, "app", 4, {}, patience=5.0)
        sent = run(open_loop(target, ["a", "b"], 50.0, 0.06, lambda: None))
    assert sorted(one.outcome for one in sent) == [FAILED, FAILED, REFUSED] and len(came) == 3
    assert {body["messages"][0]["content"] for _, _, body in came} == {"a", "b"} and all(body["stream"] for *_, body in came)
    gone = run(open_loop(target, ["a"], 50.0, 0.02, lambda: None))
    assert [one.outcome for one in gone] == [FAILED] and gone[0].why


def test_prompts_that_are_not_there(storage: Path, tiny_base_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "chat"}]}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"load\.prompts=.*has no prompt in words"):
        run_load(config_for(storage, tiny_base_dir, tmp_path / "p.jsonl"))
    with pytest.raises(InputError, match="no such file"):
        run_load(config_for(storage, tiny_base_dir, tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match=r"load\.rates"):
        config_for(storage, tiny_base_dir, tmp_path / "p.jsonl", load__rates=[0])


@pytest.mark.slow
def test_nothing_is_lost_at_four_times_the_capacity(storage: Path, tiny_base_dir: Path, tmp_path: Path, local_ray: None,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {n}"}) + "\n" for n in range(5)), encoding="utf-8")
    config = config_for(storage, tiny_base_dir, prompts)
    result = run_load(config)
    calm, crowded = result.figures["rates"]
    assert result.figures["capacity"]["requests_per_second"] > 0
    for rate in (calm, crowded):
        assert rate["sent"] == rate["ok"] + rate["refused"] and rate["failed"] == rate["lost"] == 0
    assert crowded["sent"] > calm["sent"] and crowded["refused"] > calm["refused"]  # the machine may be busy with other things
    folder = RunPaths.of(config).stage("load")
    rows = [json.loads(line) for line in (folder / "rates.jsonl").read_text().splitlines()]
    assert len(rows) == calm["sent"] + crowded["sent"] and all(row["tokens"] <= 12 for row in rows)
    assert (folder / "load.png").read_bytes().startswith(b"\x89PNG") and "| 4 |" in (folder / "report.md").read_text()
    with pytest.raises(httpx.HTTPError):  # the application that it started is gone
        httpx.get(f"http://127.0.0.1:{config.serve.port}/health")
    assert run_load(config).skipped
    with pytest.raises(InputError, match="another run"):  # another base's report is not this one's
        run_load(config.model_copy(update={"base": config.base.model_copy(update={"dtype": "bf16"})}))
