"""Verdicts of a bench on a base that has no exact form: its own format is the measure, and the stage finishes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hydra_core.base import Base, load_base, load_vocabulary, quantisation
from hydra_core.decoding import Engine, Result, compare, naive_generate
from hydra_core.decoding.records import StepOutput
from hydra_core.proposers.settings import Drafter
from hydra_core.sampling import Request
from hydra_core.tree import TreeSet
from pipelines.bench import losslessness
from pipelines.bench.hf_transformers import single_contender
from pipelines.bench.losslessness import (
    ARRIVAL_STEPS,
    check_differences,
    check_losslessness,
    proof_of,
    read_losslessness,
    read_proof,
)
from pipelines.bench.plan import BenchPlan, Question, Row, make_drafter, room_for
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


class Watched(Engine):
    """An engine that tells how it was made and used, and whose text lookup gives another last token in a batch."""

    made: ClassVar[list[Watched]] = []

    def __init__(self, base: Base, drafter: Drafter | None = None, trees: TreeSet | None = None, **limits: Any) -> None:
        super().__init__(base, drafter, trees, **limits)
        self.drafter, self.limits, self.steps = drafter, limits, 0
        self.alone: list[str] = []
        self.arrived: list[tuple[str, int]] = []
        self.made.append(self)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        self.alone += [request.id for request in requests]
        return super().generate(requests)

    def add(self, request: Request) -> None:
        self.arrived.append((request.id, self.steps))
        super().add(request)

    def step(self) -> list[StepOutput]:
        self.steps += 1
        return [self._spoilt(output) for output in super().step()]

    def _spoilt(self, output: StepOutput) -> StepOutput:
        if output.result is None or self.drafter is None or self.alone:
            return output
        return replace(output, result=replace(output.result, token_ids=(*output.result.token_ids[:-1], 3)))


def test_every_contender_is_asked_alone_and_in_a_batch_and_wrong_answers_are_judged_exactly(
        tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With its own drafter, in the batch with a sequence that joins later, within the room that the questions need; each answer
    is compared with the naive loop's, a differing one in float64, for which the base is loaded once."""
    plan = plan_of(tiny_base_dir, tmp_path)
    compared: list[tuple[Base, tuple[int, ...], tuple[int, ...], tuple[int, ...], Base | None]] = []
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(Watched, "made", [])
    monkeypatch.setattr(losslessness, "Engine", Watched)
    monkeypatch.setattr(losslessness, "compare", lambda *given: (compared.append(given), compare(*given))[1])
    monkeypatch.setattr(losslessness, "drafter_of", lambda method, *given, **more: (
        asked.append((method, more)), make_drafter(method, *given, **more))[1])
    check_losslessness(plan, QUESTIONS)

    base = compared[0][0]
    limit = room_for(base, 12, QUESTIONS)
    assert [(one.drafter is not None, one.limits) for one in Watched.made] == [
        (drafts, {"max_batch_size": rows, "context_limit": limit}) for rows in (1, 2) for drafts in (False, True)]
    assert asked == [(method, {"measured": False}) for _ in (1, 2) for method in ("plain", "ngram")]
    assert [one.alone for one in Watched.made] == [["a", "b"], ["a", "b"], [], []]
    assert all(one.arrived == [("a", 0), ("b", ARRIVAL_STEPS)] for one in Watched.made[2:])

    expected = {q.id: naive_generate(base, Request(q.id, q.prompt_ids, 12, stop_ids=()), limit).token_ids for q in QUESTIONS}
    assert len(compared) == 8 and {given[0] for given in compared} == {base}
    assert all(given[2] == expected["a" if given[1] == QUESTIONS[0].prompt_ids else "b"] for given in compared)
    assert [given[1] for given in compared[:6]] == [one.prompt_ids for one in QUESTIONS] * 3
    assert all(given[3] == given[2] for given in compared[:6]) and all(given[3] != given[2] for given in compared[6:])
    exact = compared[-1][4]
    assert exact is not None and exact is compared[-2][4] and all(given[4] is None for given in compared[:6])
    assert exact.hidden_states([[5, 6]])[0].dtype == torch.float64
    found = read_losslessness(Path(plan.losslessness_file))
    assert [(row.method, row.rows, row.verdict, row.index) for row in found[4:]] == [
        ("plain", 2, "identical", None), ("plain", 2, "identical", None),
        ("ngram", 2, "different", 11), ("ngram", 2, "different", 11)]
    said = capsys.readouterr().err
    assert "bench: fp32 losslessness, ngram, batch of 2: 0 of 2 answers are identical" in said
    assert "bench: fp32 losslessness, plain, batch of 2: 2 of 2 answers are identical" in said


def test_verdicts_of_the_naive_loop_are_none_of_timed_answers(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Both kinds lie in one file; a timed answer that differs gets its own verdict, once."""
    plan = replace(plan_of(tiny_base_dir, tmp_path), identity_formats=("bf16",))
    check_losslessness(plan, QUESTIONS)
    before = read_losslessness(Path(plan.losslessness_file))
    assert {row.dtype for row in before} == {"bf16"} and len(before) == 8
    answer = tuple(range(9, 20))

    def row(method: str, tokens: tuple[int, ...]) -> Row:
        return Row(round=0, question="a", category="all", method=method, token_ids=tokens, steps=1, prefill_seconds=1.0,
                   decode_seconds=1.0)

    rows = [row("plain", answer), row("ngram", (*answer[:5], 3, *answer[6:]))]
    for _ in range(2):
        check_differences(plan, QUESTIONS, rows)
        (found,) = read_losslessness(Path(plan.losslessness_file))[8:]
        assert (found.question, found.method, found.rows, found.index) == ("a", "ngram", 0, 5)


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


@pytest.mark.parametrize(("free", "proof", "exact"), [(10**12, "fp32", True), (1, "bf16", False)])
def test_a_base_that_does_not_fit_in_fp32_is_judged_in_its_own_format(
        tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free: int,
        proof: str, exact: bool) -> None:
    """As one of 70B: in the format in which it is timed, by the float64 logits of the last position where that is all that fits.
    The choice is kept for a bench that is gone on with."""
    plan = plan_of(tiny_base_dir, tmp_path)
    judged: list[Base | None] = []
    monkeypatch.setattr(losslessness, "free_bytes", lambda device: free)
    monkeypatch.setattr(losslessness, "Engine", Watched)
    monkeypatch.setattr(losslessness, "compare", lambda *given: (judged.append(given[4]), compare(*given))[1])
    check_losslessness(plan, QUESTIONS)
    found = read_losslessness(Path(plan.losslessness_file))
    assert {row.dtype for row in found} == {proof} and len(found) == 8
    assert (judged[-1] is not None) == exact and found[-1].verdict == "different"
    told = read_proof(tmp_path / "proof.json")
    assert told is not None and told["format"] == proof and bool(told["why"]) != exact
    said = capsys.readouterr().err
    assert ("losslessness is shown in bf16, the base's own format: in fp32 its weights take 0.0 GB" in said) != exact
    assert ("judged by the logits of the last position alone" in said) != exact
    monkeypatch.setattr(losslessness, "free_bytes", lambda device: 10**12 if free == 1 else 1)
    check_losslessness(plan, QUESTIONS)
    assert read_losslessness(Path(plan.losslessness_file)) == found


def test_a_base_that_is_made_four_bit_is_judged_in_that(tiny_base_dir: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_base_dir, tmp_path)
    lossy = replace(plan, base=plan.base.model_copy(update={"dtype": "int4-lossy"}))
    assert proof_of(lossy)["format"] == "int4-lossy"
    (tmp_path / "proof.json").unlink()
    fp32 = replace(plan, base=plan.base.model_copy(update={"dtype": "fp32"}))
    assert proof_of(fp32) == {"format": "fp32", "why": ""}
