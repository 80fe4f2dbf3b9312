"""Heads that are promoted while a job is not finished: they change no answer, so the job goes on, and a finished one stays so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydra_core.errors import InputError, StoppedError
from pipelines.batch import stage as batch_stage
from pipelines.batch.input_digest import input_digest
from pipelines.batch.stage import EXECUTION_FIELDS, run_batch
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import fingerprint
from pipelines.serve.messages import AppArgs
from pipelines.serve.model_identity import ModelDigest
from tests.pipelines.batch.stand_in import A_WITH_HEADS, A, B, StandIn
from tests.pipelines.batch.test_http_backend import ROWS, make, server, stop_and_come_back, texts  # noqa: F401

OTHER_HEADS = ModelDigest(A.base, A.context_limit, "other-heads")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("first", [A, A_WITH_HEADS])
def test_a_job_goes_on_with_other_heads(make: Callable[..., RunConfig], server: StandIn, first: ModelDigest,  # noqa: F811
                                        temperature: float) -> None:
    server.become(first)
    stop_and_come_back(server, lambda it: it.become(B))
    config = make(batch__temperature=temperature)
    with pytest.raises(StoppedError, match="answers with another model now"):
        run_batch(config)
    server.become(OTHER_HEADS)
    result = run_batch(config)
    assert (result.figures["rows"], result.figures["errors"]) == (ROWS, 0) and result.figures["resumed"] > 0
    assert texts(Path(result.outputs["rows"]).parent) == {n + 1: f"{A.base}: question {n}" for n in range(ROWS)}
    server.become(first)
    assert run_batch(config).skipped
    server.become(B)
    with pytest.raises(InputError, match="another run"):
        run_batch(config)


@pytest.mark.parametrize("configuration", [A.configuration, A_WITH_HEADS.configuration])
def test_a_job_of_an_earlier_version_goes_on(make: Callable[..., RunConfig], server: StandIn,  # noqa: F811
                                             configuration: str) -> None:
    """Which had the heads in its fingerprint: those that are served now, or none."""
    stop_and_come_back(server, lambda it: it.become(B))
    config = make()
    with pytest.raises(StoppedError):
        run_batch(config)
    settings = config.batch.model_dump(exclude=EXECUTION_FIELDS) | {"format": "jsonl"}
    then = ModelDigest(A.base, A.context_limit, configuration)
    claim = Path(str(config.batch.output)) / "claim.json"
    kept = json.loads(claim.read_text())
    kept["fingerprint"] = fingerprint("batch", settings | asdict(then), {"input": input_digest(config)})
    claim.write_text(json.dumps(kept))
    server.become(A_WITH_HEADS)
    assert run_batch(config).figures["rows"] == ROWS and run_batch(config).skipped


@pytest.mark.parametrize(("running", "taken"), [(A, True), (A_WITH_HEADS, True), (B, False), (
    ModelDigest(A.base, 100, A.configuration), False)])
def test_an_application_with_other_heads_is_used(make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch,  # noqa: F811
                                                 running: ModelDigest, taken: bool) -> None:
    config, args = make(), AppArgs({}, "", None, "plain")
    found = SimpleNamespace(applications={config.serve.app_name: SimpleNamespace(status="RUNNING")})
    monkeypatch.setattr(batch_stage, "running_instance", lambda: found)
    monkeypatch.setattr(batch_stage, "ask_replicas", lambda _: asdict(running) | {"label": "theirs"})
    if taken:
        with batch_stage._application(config, args, A) as found_name:
            assert found_name == (config.serve.app_name, "theirs")
    else:
        with pytest.raises(InputError, match="is asked for"), batch_stage._application(config, args, A):
            pass
