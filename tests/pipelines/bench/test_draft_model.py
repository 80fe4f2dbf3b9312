"""A draft model as a contender, as the configuration that is promoted, and as what serve, batch and generate load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import Base
from hydra_core.decoding import Engine, check_heads, load_heads, naive_generate, read_configuration, save_configuration
from hydra_core.errors import InputError
from hydra_core.proposers import DraftModel
from hydra_core.sampling import Request
from pipelines.bench.champion import same_contender
from pipelines.bench.inputs import bench_fingerprint, check_contenders, find_methods
from pipelines.bench.latency import measure_single
from pipelines.bench.losslessness import check_losslessness, read_losslessness
from pipelines.bench.plan import BenchPlan, read_rows
from pipelines.bench.questions import load_questions
from pipelines.bench.stage import _plan
from pipelines.config import RunConfig, load_config
from pipelines.promote.stage import _configuration, _sizes
from tests.trained import noisy_copy

ROWS = [{"question_id": number, "category": "writing", "turns": [text]} for number, text in enumerate(("say it", "again"))]


@pytest.fixture(scope="module")
def draft_dir(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft") / "model"
    noisy_copy(tiny_base_dir, folder)
    return folder


def config_for(base_dir: Path, folder: Path, **changes: object) -> RunConfig:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in ROWS), encoding="utf-8")
    values = {"storage": str(folder), "base.model": str(base_dir), "base.dtype": "fp32", "bench.prompts": str(path),
              "bench.max_new_tokens": 30, "bench.threads": 1, "bench.identity_prompts": 2, "bench.identity_batch": 2}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def plan_for(config: RunConfig, folder: Path, *methods: str) -> BenchPlan:
    (folder / "bench").mkdir(exist_ok=True)
    return _plan(config, folder / "bench", methods, {})


def test_it_is_timed_and_is_lossless(tiny_base_dir: Path, draft_dir: Path, tmp_path: Path) -> None:
    config = config_for(tiny_base_dir, tmp_path, draft_model__model=str(draft_dir), draft_model__floor=0)
    plan, questions = plan_for(config, tmp_path, "plain", "draft-model"), load_questions(config)[0]
    measure_single(plan, questions)
    rows = {(row.method, row.question): row for row in read_rows(Path(plan.rows_file))}
    for question in questions:
        plain, drafted = rows["plain", question.id], rows["draft-model", question.id]
        assert plain.token_ids == drafted.token_ids and drafted.steps < 0.7 * plain.steps and drafted.draft_seconds > 0
    check_losslessness(plan, questions)
    found = read_losslessness(Path(plan.losslessness_file))
    assert [row.verdict for row in found if row.method == "draft-model"] == ["identical"] * 4


def test_it_is_timed_where_it_is_named(tiny_base_dir: Path, draft_dir: Path, tmp_path: Path) -> None:
    """A bench without one is still found as before; with one, its files and its trees count."""
    without = config_for(tiny_base_dir, tmp_path)
    make: Any = lambda **changes: config_for(tiny_base_dir, tmp_path, **{"draft_model__model": str(draft_dir), **changes})  # noqa: E731
    assert "draft-model" not in find_methods(without, {}) and "draft-model" in find_methods(make(), {})
    copy = shutil.copytree(draft_dir, tmp_path / "copy")
    configs = [without, make(), make(draft_model__depth=2), make(draft_model__model=str(copy))]
    prints = [bench_fingerprint(config, {}) for config in configs]
    assert prints[0] != prints[1] != prints[2] != prints[0] and prints[1] == prints[3]
    (copy / "config.json").write_text((copy / "config.json").read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert bench_fingerprint(configs[3], {}) != prints[1]
    with pytest.raises(InputError, match=r"bench\.methods: draft-model needs draft_model\.model"):
        find_methods(config_for(tiny_base_dir, tmp_path, bench__methods=["draft-model"]), {})
    missing = config_for(tiny_base_dir, tmp_path, draft_model__model="/no/such/folder")
    with pytest.raises(InputError, match=r"^draft_model\.model=/no/such/folder: no such folder"):
        check_contenders(missing, ("plain", "draft-model"), {})


def test_its_configuration_decodes(tiny_base_dir: Path, tiny_base: Base, draft_dir: Path, tmp_path: Path) -> None:
    config = config_for(tiny_base_dir, tmp_path, draft_model__model=str(draft_dir), draft_model__depth=3, draft_model__floor=0)
    plan = plan_for(config, tmp_path, "plain", "draft-model")
    sizes = _sizes({"plan": plan.to_json(), "methods": ["plain", "draft-model"]})
    assert sizes["plain"] == 0 and sizes["draft-model"] == sum(path.stat().st_size for path in draft_dir.iterdir())
    made = _configuration(config, "draft-model", plan.to_json())
    save_configuration(tmp_path / "made", made)
    assert read_configuration(tmp_path / "made") == made
    assert same_contender(made, {}, ("plain", "draft-model"), made.ngram, config.draft_model.values()) == "draft-model"
    other = config.draft_model.model_copy(update={"depth": 2}).values()
    assert same_contender(made, {}, ("plain", "draft-model"), made.ngram, other) is None
    assert same_contender(made, {}, ("plain",), made.ngram, config.draft_model.values()) is None
    check_heads(tmp_path / "made", tiny_base.vocabulary)
    drafter, trees = load_heads(tmp_path / "made", tiny_base)
    assert isinstance(drafter, DraftModel) and drafter.growth.depth == 3 and trees is None
    request = Request("r", (5, 6, 7), 30, stop_ids=())
    result = Engine(tiny_base, drafter).generate([request])[0]
    assert result.token_ids == naive_generate(tiny_base, request).token_ids and result.accepted > 5


def test_a_configuration_whose_model_is_gone_is_refused(tiny_base_dir: Path, tiny_base: Base, draft_dir: Path,
                                                        tmp_path: Path) -> None:
    gone = shutil.copytree(draft_dir, tmp_path / "gone")
    config = config_for(tiny_base_dir, tmp_path, draft_model__model=str(gone))
    save_configuration(tmp_path / "made", _configuration(config, "draft-model", plan_for(config, tmp_path).to_json()))
    shutil.rmtree(gone)
    for load in (lambda: check_heads(tmp_path / "made", tiny_base.vocabulary), lambda: load_heads(tmp_path / "made", tiny_base)):
        with pytest.raises(InputError, match=r"^draft_model\.model=.*gone: no such folder"):
            load()
    path = tmp_path / "made" / "configuration.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for broken in ({}, {"model": "x", "depth": 0}, {"model": "x", "deep": 1}):
        path.write_text(json.dumps(values | {"draft_model": broken}), encoding="utf-8")
        with pytest.raises(InputError, match="is not a decoding configuration"):
            read_configuration(tmp_path / "made")
