"""Verdicts of a bench on a base that has no exact form: its own format is the measure, and the stage finishes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hydra_core.base import Base, load_base, load_vocabulary, quantisation
from hydra_core.decoding import naive_generate
from hydra_core.sampling import Request
from pipelines.bench.hf_transformers import single_contender
from pipelines.bench.losslessness import check_differences, check_losslessness, read_losslessness
from pipelines.bench.plan import BenchPlan, Question, Row
from pipelines.bench.report import method_table, summarise
from pipelines.bench.stage import _plan as bench_plan
from pipelines.config import load_config

QUESTIONS = [Question("a", "all", (5, 6, 7)), Question("b", "all", (9, 8, 7, 6, 5))]


@pytest.fixture
def quantised(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that says it is quantised by AWQ. The methods need a GPU, so its modules are plain ones here, which refuse to be
    moved as quantised ones do."""
    folder = shutil.copytree(tiny_base_dir, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def load(found: Path, **settings: Any) -> Any:
        assert settings["device_map"] == {"": torch.device("cpu")} and settings["trust_remote_code"] is False
        told = settings.get("output_loading_info", False)
        made = LlamaForCausalLM.from_pretrained(tiny_base_dir, dtype=settings["dtype"], output_loading_info=told)
        model = made[0] if told else made
        model.to = lambda *_: pytest.fail("a quantised model was moved")
        return made

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    return folder


def plan_of(base: Path, folder: Path, **changes: Any) -> BenchPlan:
    config = load_config(None, {"storage": str(folder), "base.model": str(base), "base.dtype": "bf16", "bench.max_new_tokens": 12,
                                "bench.identity_batch": 2, **changes})
    return bench_plan(config, folder, ("plain", "ngram"), {})


def test_a_quantised_base_is_compared_with_itself(quantised: Path, tmp_path: Path) -> None:
    assert quantisation(str(quantised), cache=tmp_path) == "awq"
    plan = plan_of(quantised, tmp_path)
    assert plan.identity_formats == ("fp32",)  # the default, which such a base cannot have
    check_losslessness(plan, QUESTIONS)
    found = read_losslessness(Path(plan.losslessness_file))
    assert {row.dtype for row in found} == {"bf16"} and len(found) == 2 * 2 * 2
    assert {row.verdict for row in found} <= {"identical", "near-tie"}
    figures = summarise([], found)
    assert figures["ngram"]["fp32"] is None and figures["ngram"]["naive"]["bf16"]["answers"] == 4
    table = method_table(figures, "all", "bf16")
    assert list(table.columns)[-1] == "bf16 lossless" and all(cells[-1].endswith("of 4") for cells in table.rows)
    check_losslessness(plan, QUESTIONS)  # nothing is left to do
    assert read_losslessness(Path(plan.losslessness_file)) == found


def test_its_timed_answers_get_verdicts_too(quantised: Path, tmp_path: Path) -> None:
    plan = plan_of(quantised, tmp_path)
    base = load_base(str(quantised), dtype="bf16", cache=Path(plan.cache))
    answers = {q.id: naive_generate(base, Request(q.id, q.prompt_ids, 12, stop_ids=())).token_ids for q in QUESTIONS}
    scores = base.logits(base.hidden_states([[*QUESTIONS[1].prompt_ids, *answers["b"][:6]]])[0][-1])
    wrong = (*answers["b"][:6], int(scores.argmin()), *answers["b"][7:])

    def row(method: str, question: str, tokens: tuple[int, ...]) -> Row:
        return Row(round=0, question=question, category="all", method=method, token_ids=tokens, steps=1, prefill_seconds=1.0,
                   decode_seconds=1.0)

    check_differences(plan, QUESTIONS, [row("plain", "a", answers["a"]), row("plain", "b", answers["b"]),
                                        row("ngram", "a", answers["a"]), row("ngram", "b", wrong)])
    (found,) = read_losslessness(Path(plan.losslessness_file))
    assert (found.question, found.verdict, found.index, found.rows, found.dtype) == ("b", "different", 6, 0, "bf16")
    assert found.gap == pytest.approx(float(scores.max() - scores.min()), rel=0.05)


def test_a_base_is_judged_with_the_limit_of_the_plan(tiny_base_dir: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A base without a limit of its own has none but that, and the prompts of turns are cut to it."""
    plan = plan_of(tiny_base_dir, tmp_path, **{"base.context_limit": 64})
    limits, load = [], Base.__init__
    monkeypatch.setattr(Base, "__init__", lambda self, *given: (limits.append(given[3]), load(self, *given))[1])
    answer = tuple(range(9, 20))

    def row(method: str, tokens: tuple[int, ...]) -> Row:
        return Row(round=0, question="a", category="all", method=method, token_ids=tokens, steps=1, prefill_seconds=1.0,
                   decode_seconds=1.0)

    check_differences(plan, QUESTIONS, [row("plain", answer), row("ngram", (*answer[:5], 3, *answer[6:]))])
    assert len(read_losslessness(Path(plan.losslessness_file))) == 1 and limits == [64, 64]  # the base, and its exact form


def test_transformers_runs_it_where_it_was_loaded(quantised: Path, tmp_path: Path) -> None:
    plan = plan_of(quantised, tmp_path)
    base = load_base(str(quantised), dtype="bf16", cache=Path(plan.cache))
    assert len(single_contender(plan, base, None)((5, 6, 7), 4).token_ids) == 4
    assert load_vocabulary(str(quantised), dtype="bf16", cache=Path(plan.cache)).identity == base.identity


def test_another_base_is_still_judged_by_its_exact_form(tiny_base_dir: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_base_dir, tmp_path)
    assert quantisation(str(tiny_base_dir), cache=tmp_path) is None
    check_losslessness(plan, QUESTIONS[:1])
    assert {row.dtype for row in read_losslessness(Path(plan.losslessness_file))} == {"fp32"}
