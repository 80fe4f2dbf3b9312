"""From prompts to heads without storing the training rows' hidden states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine, naive_generate
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.sampling import Request
from pipelines.config import load_config
from pipelines.distill.stage import run_distill
from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.schemas import FEATURES
from pipelines.runtime.artifacts import RunPaths
from pipelines.train.stage import run_train


@pytest.mark.slow
def test_answers_alone_are_enough(local_ray: None, tiny_base: Base, tiny_base_dir: Path, storage: Path) -> None:
    prompts = storage.parent / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(24)))
    settings = {"storage": str(storage), "base.model": str(tiny_base_dir), "base.dtype": "fp32", "prompts.source": "jsonl",
                "prompts.path": str(prompts), "distill.max_new_tokens": 12, "distill.workers.threads": 1,
                "distill.held_out": 0.3, "distill.features": "held_out", "train.features": "online",
                "train.drafters": {"hydra++": {"kind": "hydra++", "draft_vocab_size": 0, "num_heads": 2}},
                "train.rows_per_step": 4, "train.max_steps": 12, "train.validate_every": 6}
    config = load_config(None, settings)
    answers = run_distill(config).figures["responses"]
    folder = RunPaths.of(config).stage("distill") / "features"
    assert set(read_parts(folder, FEATURES, ["split"])["split"].to_pylist()) == {"held_out"}
    with pytest.raises(InputError, match=r"no rows of the split 'train': .*distill\.features=all"):
        run_train(load_config(None, settings | {"train.features": "stored"}))
    result = run_train(config)
    curve = (RunPaths.of(config).stage("train", "hydra++") / "curve.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in curve]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    load_checkpoint(Path(result.outputs["hydra++"]), tiny_base.vocabulary)
    assert run_distill(config).skipped
    eagle = load_config(None, settings | {"train.drafters": {"deep": {"kind": "eagle3", "draft_vocab_size": 0, "num_heads": 2}}})
    result = run_train(eagle)
    curve = (RunPaths.of(eagle).stage("train", "deep") / "curve.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in curve]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3]) and result.figures["deep"]["tokens_per_step"] > 1
    drafter = load_checkpoint(Path(result.outputs["deep"]), tiny_base.vocabulary).drafter
    assert drafter.taps == (1, 1, 0)
    request = Request("r", (5, 6, 7), 20)
    decoded = Engine(tiny_base, drafter).generate([request])[0]
    assert decoded.token_ids == naive_generate(tiny_base, request).token_ids and decoded.drafted > 0
    whole = run_distill(load_config(None, settings | {"distill.features": "all"}))  # the answers stand: features are added
    assert not whole.skipped and whole.figures["resumed"] == answers == len(read_parts(folder, FEATURES, ["id"]))
    assert run_distill(load_config(None, settings | {"distill.features": "all"})).skipped
