"""The loop closed: an endpoint whose traffic is of another kind, one command, and heads that know that kind too."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hydra_core.base import Base, load_base
from hydra_core.decoding import DecodingConfiguration, naive_generate, save_configuration
from hydra_core.heads import HeadDrafter
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from pipelines.config import RunConfig, load_config
from pipelines.loop import stage
from pipelines.loop.stage import run_loop
from pipelines.rows.schemas import content_id, split_of
from pipelines.rows.served_records import ServedRecord, read_records, record_parts
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, stage_folder
from pipelines.serve.served_app import ServedApp
from pipelines.serve.stage import resolve_args, start_app, with_running_settings
from pipelines.tracking import Tracker, register
from pipelines.tree import stage as tree_stage
from tests.pipelines.serve.clients import MODEL, until
from tests.pipelines.serve.test_stage import free_port
from tests.pipelines.synthetic import write_shard
from tests.trained import random_heads, teacher_forced_loss
from tests.two_languages import ANSWER, prompts, save_base

pytestmark = [pytest.mark.slow, pytest.mark.drawn, pytest.mark.timeout(1500)]
NAME = "two"
TREES = TreeSet({1: DraftTree(((0,), (0, 0), (0, 0, 0)))})


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("two-languages"))


@pytest.fixture(scope="module")
def base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(base_dir), dtype="fp32", cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def traffic() -> dict[str, list[str]]:
    """Prompts of both languages in a shuffled order: the first 60 are learned from, the last 12 are measured on."""
    found = {language: prompts(language) for language in ("low", "high")}
    for language, texts in found.items():
        random.Random(language).shuffle(texts)
    return found


@pytest.fixture(scope="module")
def config(base_dir: Path, base: Base, traffic: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that has distilled `low`, whose heads are the champion; and the settings of a loop."""
    root = tmp_path_factory.mktemp("loop")
    (root / "standing.jsonl").write_text("".join(f"{json.dumps({'prompt': text})}\n" for text in traffic["low"][-12:]), "utf-8")
    config = load_config(None, {
        "storage": str(root / "storage"), "name": NAME, "base.model": str(base_dir), "base.dtype": "fp32",
        "promote.model_name": NAME, "serve.model": f"models:/{NAME}@champion", "serve.follow_registry": 1,
        "serve.port": free_port(), "serve.workers.threads": 1, "serve.record.share": 1.0, "serve.record.rows_per_file": 8,
        "serve.record.seconds": 1, "distill.max_new_tokens": ANSWER, "distill.workers.threads": 1, "distill.held_out": 0.3,
        "distill.feature_dtype": "fp32", "train.drafters": {"hydra": {"kind": "hydra", "num_heads": 3, "draft_vocab_size": 0}},
        "train.workers.count": 1, "train.max_steps": 60, "train.rows_per_step": 8, "train.validate_every": 30, "train.lr": 5e-3,
        "train.validation_rows": 16, "tree.batch_sizes": [1], "tree.node_counts": [1, 2, 4], "tree.context": 16,
        "tree.repeats": 3, "tree.threads": 1, "tree.max_rows": 16, "bench.limit": 6, "bench.max_new_tokens": ANSWER,
        "bench.identity_prompts": 2, "bench.identity_batch": 0, "bench.threads": 1, "bench.methods": ["hydra"],
        "loop.partition": "first", "loop.min_answers": 40, "loop.standing": str(root / "standing.jsonl"), "loop.max_drop": 0.2})
    rows = [row_of(base, text) for text in traffic["low"][:60]]
    write_distilled(config, rows)
    heads = heads_of_low(base, rows)
    save_checkpoint(root / "heads", heads, base.identity, TREES, {})
    promote(config, base, root / "heads", root / "configuration")
    return config


def row_of(base: Base, text: str) -> dict[str, Any]:
    """A row of features of the base's own answer, by the contract."""
    prompt = base.encode_prompt(text)
    answer = list(naive_generate(base, Request("x", tuple(prompt), ANSWER)).token_ids)
    hidden, prompt_id = base.hidden_states([prompt + answer])[0].contiguous(), content_id("chat", text)
    return {"id": content_id(text), "prompt_id": prompt_id, "prompt_ids": prompt, "response_ids": answer,
            "finish_reason": "length", "temperature": 0.0, "seed": 0, "source": "test", "split": split_of(prompt_id, 0.3),
            "base": str(base.identity), "hidden": hidden.view(torch.uint8).numpy().tobytes(), "hidden_dtype": "fp32",
            "hidden_tokens": hidden.shape[0], "hidden_width": hidden.shape[1], "hidden_layer": "last"}


def write_distilled(config: RunConfig, rows: list[dict[str, Any]]) -> None:
    folder = RunPaths.of(config).stage("distill")
    with stage_folder(config, "distill", folder, fingerprint("distill", {"test": len(rows)}, {})) as claimed:
        path = folder / "features" / "part-0.parquet"
        write_shard(path, rows)
        claimed.finish(StageResult("distill", None, {"features": str(folder / "features")}, {}), [path])


def heads_of_low(base: Base, rows: list[dict[str, Any]]) -> HeadDrafter:
    """Heads that have heard one language."""
    heads = random_heads(base, "hydra").train().requires_grad_(True)
    optimizer, chooser = torch.optim.Adam(heads.parameters(), lr=5e-3), random.Random(0)
    for _ in range(150):
        row = chooser.choice(rows)
        ids = torch.tensor(row["prompt_ids"] + row["response_ids"])
        hidden = torch.frombuffer(bytearray(row["hidden"]), dtype=torch.float32).view(len(ids), -1)
        loss = teacher_forced_loss(heads, ids, hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.eval().requires_grad_(False)


def promote(config: RunConfig, base: Base, heads: Path, folder: Path) -> int:
    """Register heads, to which the alias points then."""
    save_configuration(folder, DecodingConfiguration("hydra", "heads", base.identity, heads=heads))
    with Tracker.open(config).start("promote") as run:
        run.log_artifact(folder, "configuration")
        return register(config, NAME, run, "configuration", "champion", {})


@pytest.fixture(scope="module")
def app(local_ray: None, config: RunConfig) -> Iterator[ServedApp]:
    served = start_app(config, with_running_settings(config, resolve_args(config)))
    yield served
    served.stop()


def tokens_per_step(app: ServedApp, texts: list[str]) -> float:
    """Of all answers together, as the endpoint tells it."""
    tokens = steps = 0
    for text in texts:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": ANSWER, "temperature": 0}
        usage = httpx.post(f"{app.url}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()["usage"]
        tokens += usage["completion_tokens"] - 1
        steps += usage["speculative"]["steps"]
    return tokens / steps


def recorded(config: RunConfig) -> list[ServedRecord]:
    folder = Path(config.storage) / "served" / config.serve.app_name
    found = [record for path, _ in record_parts(folder) for record in read_records(path)]
    assert all(isinstance(record, ServedRecord) for record in found)
    return found  # type: ignore[return-value]


def test_traffic_of_another_kind_becomes_heads_that_know_it(app: ServedApp, config: RunConfig, base: Base,
                                                            traffic: dict[str, list[str]], tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    # the steps of so small a base take no time, so neither the tree nor the gates may go by the clock here
    monkeypatch.setattr(tree_stage, "best_choice", lambda choices: max(choices, key=lambda choice: choice.tokens_per_step))

    def promote_without_clock(chosen: RunConfig) -> StageResult:
        if not (tmp_path / "challenger").exists():  # as the stage itself, which does nothing twice
            promote(config, base, RunPaths.of(chosen).stage("tree", "hydra") / "heads", tmp_path / "challenger")
        return StageResult("promote", None, {}, {"champion": "hydra", "version": 2, "why": "the only contender"})

    monkeypatch.setattr(stage, "run_promote", promote_without_clock)
    before = {language: tokens_per_step(app, texts[-12:]) for language, texts in traffic.items()}
    assert before["low"] > 2.5 and before["high"] < 1.2  # a shift that shows
    tokens_per_step(app, traffic["high"][:60])
    until(lambda: len(recorded(config)) == 84, "not all is recorded")

    result = run_loop(config)
    assert result.figures["promoted"] and result.figures["version"] == 2 and result.figures["answers"] == 84
    assert result.figures["standing"]["hydra"]["tokens_per_step"] > 0.9 * before["low"]
    assert result.figures["traffic"]["hydra"]["tokens_per_step"] > 2 * before["high"]
    folder = Path(result.outputs["run"])
    provenance = json.loads((folder / "train" / "hydra" / "heads" / "provenance.json").read_text("utf-8"))
    assert provenance["start_digest"], "training goes on from the champion"

    until(lambda: httpx.get(f"{app.url}/v1/models", timeout=60).json()["data"][0]["version"] == 2, "the endpoint does not follow")
    after = {language: tokens_per_step(app, texts[-12:]) for language, texts in traffic.items()}
    assert after["high"] > 2 * before["high"] and after["low"] > 0.9 * before["low"], (before, after)
    print(f"tokens per step before and after: {before}, {after}")

    made = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    assert len(made) == 5  # distill, train, tree and two benches
    again = run_loop(config)  # what has been answered since is another turn's
    assert again.figures["answers"] == 84 and {path: path.stat().st_mtime_ns for path in made} == made


def test_too_few_answers_train_nothing(app: ServedApp, config: RunConfig) -> None:
    few = config.model_copy(update={"loop": config.loop.model_copy(update={"partition": "second", "min_answers": 10_000})})
    result = run_loop(few)
    assert not result.figures["promoted"] and "fewer than loop.min_answers=10000: nothing is trained" in result.figures["why"]
    assert not (Path(result.outputs["run"]) / "train").exists()
