"""Drafts from earlier answers as a contender: within a round, never from one round to the next, and never promoted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.errors import InputError
from hydra_core.proposers import AdaptiveDrafter, SuffixDrafter
from pipelines.bench.inputs import bench_fingerprint, find_methods
from pipelines.bench.latency import measure_single
from pipelines.bench.plan import make_drafter, read_rows
from pipelines.bench.questions import load_questions
from pipelines.bench.stage import _plan
from pipelines.config import PromoteSection, RunConfig, load_config
from pipelines.config.bench import SHARED_ANSWERS
from pipelines.promote.decision import decide
from pipelines.promote.stage import _read_report

ROWS = [{"question_id": number, "category": "writing", "turns": ["say it again"]} for number in (1, 2)]
"""The same question twice: the second time its answer is known."""


def config_for(base_dir: Path, folder: Path, **changes: object) -> RunConfig:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in ROWS), encoding="utf-8")
    values = {"storage": str(folder), "base.model": str(base_dir), "base.dtype": "fp32", "bench.prompts": str(path),
              "bench.max_new_tokens": 40, "bench.identity_prompts": 0, "bench.threads": 1, "bench.rounds": 2}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def test_a_round_begins_without_answers(tiny_base_dir: Path, tmp_path: Path) -> None:
    config = config_for(tiny_base_dir, tmp_path)
    (tmp_path / "bench").mkdir()
    plan = _plan(config, tmp_path / "bench", ("plain", "suffix"), {})
    measure_single(plan, load_questions(config)[0])
    rows = read_rows(Path(plan.rows_file))
    steps = {(row.round, row.question): row.steps for row in rows if row.method == "suffix"}
    assert len({row.token_ids for row in rows}) == 1 and len(rows) == 8
    assert steps[0, "2"] < steps[0, "1"]


def test_which_contenders_draft_from_answers(tiny_base_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    apart, shared = (_plan(config_for(tiny_base_dir, tmp_path, **changes), tmp_path, (), {})
                     for changes in ({}, {"bench__shared_answers": 77}))
    found = {}
    for name, plan in (("apart", apart), ("shared", shared)):
        for method in ("plain", "ngram", "suffix"):
            drafter = make_drafter(method, plan, tiny_base, measured=False)[0]
            found[name, method] = drafter.suffix if isinstance(drafter, AdaptiveDrafter) else None
    own, other = SuffixDrafter(max_tokens=SHARED_ANSWERS), SuffixDrafter(max_tokens=77)
    assert found == {("apart", "plain"): None, ("apart", "ngram"): None, ("apart", "suffix"): own,
                     ("shared", "plain"): None, ("shared", "ngram"): other, ("shared", "suffix"): other}


def test_it_is_timed_where_it_is_named(tiny_base_dir: Path, tmp_path: Path) -> None:
    """And a bench of an earlier version is still found."""
    config = config_for(tiny_base_dir, tmp_path)
    assert "suffix" not in find_methods(config, {})
    assert "suffix" in find_methods(config_for(tiny_base_dir, tmp_path, bench__methods=["suffix"]), {})
    assert bench_fingerprint(config, {}) != bench_fingerprint(config_for(tiny_base_dir, tmp_path, bench__shared_answers=5), {})


def test_it_is_never_promoted(tmp_path: Path) -> None:
    """No configuration stands for answers that an endpoint keeps."""
    figures = {"speed_vs_plain": 1.0, "spread": None, "tokens_per_step": 1.0, "questions": 9, "identical": 1.0,
               "vs_champion": None, "categories": {}}
    decision = decide({"plain": figures, "suffix": figures | {"speed_vs_plain": 3.0, "spread": [2.5, 3.5]}}, PromoteSection())
    assert decision.winner == "plain" and [one.contender for one in decision.contenders] == ["plain"]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"methods": {}, "plan": {"heads": {}, "shared_answers": 5}}), encoding="utf-8")
    with pytest.raises(InputError, match="bench without it"):
        _read_report(path)
