"""The closed-loop part of `bench`: figures by hand, answers that stay the same, stopped and continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.decoding import Engine, Result, StepOutput, naive_generate
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from pipelines.bench.concurrency import (
    ConcurrencyRow,
    make_requests,
    measure_concurrency,
    read_concurrency,
    run_closed_loop,
    summarise_concurrency,
)
from pipelines.bench.concurrency_report import concurrency_markdown, concurrency_metrics, concurrency_table, plot_concurrency
from pipelines.bench.latency import measure
from pipelines.bench.plan import BenchPlan, Question, make_drafter
from pipelines.bench.stage import _plan as make_plan
from pipelines.bench.stage import run_bench
from pipelines.config import BaseSection, RunConfig, load_config
from pipelines.tracking import Tracker
from tests.trained import overfit_heads, random_prompts

METHODS = ("plain", "ngram", "hydra++", "combined")
QUESTIONS = [Question(str(number), "all", prompt) for number, prompt in enumerate(random_prompts(5))]


@pytest.fixture(scope="module")
def heads(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    drafter = overfit_heads(tiny_base, "hydra++", [question.prompt_ids for question in QUESTIONS])
    folder = tmp_path_factory.mktemp("heads") / "heads"
    save_checkpoint(folder, drafter, tiny_base.identity, TreeSet({1: DraftTree(((0,), (1,), (0, 0))), 2: DraftTree(((0,),))}), {})
    return folder


def config_for(base_dir: Path, folder: Path, heads: Path, **changes: object) -> RunConfig:
    values = {"storage": str(folder), "base.model": str(base_dir), "base.dtype": "fp32", "base.context_limit": 120,
              "bench.heads": str(heads), "bench.max_new_tokens": 12, "bench.identity_prompts": 0, "bench.single": False,
              "bench.threads": 1, "bench.concurrency": [1, 3]}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture
def plan(tiny_base_dir: Path, heads: Path, tmp_path: Path) -> BenchPlan:
    return make_plan(config_for(tiny_base_dir, tmp_path, heads, bench__rounds=2, bench__load_requests=4), tmp_path / "bench",
                     METHODS, {"hydra++": str(heads)})


# -- by hand -----------------------------------------------------------------------------------------------------------

class Scripted:
    """An engine of which all that matters is what each step brings: (request id, tokens, whether it ends)."""

    def __init__(self, steps: list[list[tuple[str, int, bool]]]) -> None:
        self.steps, self.added, self.most = iter(steps), list[str](), 0
        self.running = set[str]()

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, request: Request) -> None:
        self.added.append(request.id)
        self.running.add(request.id)
        self.most = max(self.most, len(self.running))

    def step(self) -> list[StepOutput]:
        outputs = []
        for name, tokens, ends in next(self.steps):
            self.running -= {name} if ends else set()
            outputs.append(StepOutput(name, (7,) * tokens, Result(name, (5,), (7,), "length") if ends else None))
        return outputs


def ticking() -> Iterator[float]:
    """Ten milliseconds more at each look."""
    tick = 0
    while True:
        yield tick / 100
        tick += 1


def test_what_clients_see_by_hand() -> None:
    """Looks at the clock: began 0, a sent 1, b sent 2, step 3, step 4, step 5, c sent 6, step 7, ended 8."""
    engine = Scripted([[("a", 1, False), ("b", 1, False), ("b", 2, False)],  # b's prompt and its first step at once
                       [], [("a", 4, True), ("b", 1, False)], [("b", 1, True), ("c", 1, True)]])
    requests = [Request(name, (5,), 9) for name in "abc"]
    seen = run_closed_loop(engine, requests, 2, clock=ticking().__next__)  # type: ignore[arg-type]
    assert engine.added == ["a", "b", "c"] and engine.most == 2 and seen.results.keys() == {"a", "b", "c"}
    assert seen.seconds == pytest.approx(0.08)
    assert seen.first_token == pytest.approx([0.02, 0.01, 0.01])
    assert seen.between == pytest.approx([0.005] * 4 + [0.02, 0.02])  # four tokens 20 ms after the last: 5 ms each


def row(number: int, level: int, method: str, seconds: float, *, row_steps: int = 100, answers: str = "abcd") -> ConcurrencyRow:
    """Four answers of 26 tokens."""
    return ConcurrencyRow(number, level, method, 104, seconds, row_steps // level, row_steps, (seconds / 100, seconds / 10),
                   (seconds / 50, seconds / 20), tuple(answers))


ROWS = [row(0, 4, "plain", 8.0), row(0, 4, "hydra", 4.0, row_steps=50, answers="abcx"), row(1, 4, "hydra", 4.0, row_steps=50),
        row(1, 4, "plain", 10.0), row(0, 1, "plain", 20.0), row(2, 4, "hydra", 5.0, row_steps=50), row(2, 4, "plain", 10.0)]


def test_figures_by_hand() -> None:
    found = summarise_concurrency(ROWS)
    assert list(found) == ["1", "4"] and list(found["4"]) == ["plain", "hydra"]
    hydra = found["4"]["hydra"]
    assert (hydra["rounds"], hydra["requests"], hydra["tokens"]) == (3, 12, 312)
    assert hydra["tokens_per_second"] == 24.0  # 312 tokens in 13 s
    assert hydra["speed_vs_plain"] == 2.0 and hydra["range"] == [2.0, 2.5]
    assert (hydra["first_token_p50_ms"], hydra["first_token_p99_ms"]) == (40.0, 400.0)
    assert (hydra["between_tokens_p50_ms"], hydra["between_tokens_p99_ms"]) == (80.0, 200.0)
    assert hydra["tokens_per_step"] == 2.0  # the first token of an answer needs no step
    assert found["4"]["plain"]["rows_running"] == 4.0 and found["1"]["plain"]["rows_running"] == 1.0
    assert hydra["identical"] == pytest.approx(11 / 12, abs=1e-3) and found["1"]["plain"]["speed_vs_plain"] == 1.0


def test_shown_in_every_form(tmp_path: Path) -> None:
    short = replace(row(0, 16, "hydra", 1.0), between=None, steps=0, row_steps=0)
    found = summarise_concurrency([*ROWS, row(0, 1, "hydra", 1.0), short])
    cells = concurrency_table(found).rows
    assert [entry[:2] for entry in cells] == [("1", "hydra"), ("1", "plain"), ("4", "hydra"), ("4", "plain"), ("16", "hydra")]
    assert cells[2][2:] == ("24", "2.00x", "2.00 - 2.50", "40.0 / 400.0", "80.0 / 200.0", "4.2", "2.00", "92 %")
    assert cells[4][3:] == ("-", "-", "10.0 / 100.0", "- / -", "-", "-", "-")  # no plain beside it, one token an answer
    assert "| 4 | hydra | 24 | 2.00x |" in concurrency_markdown(found) and concurrency_markdown({}) == ""
    metrics = concurrency_metrics(found)
    assert metrics["load.4.hydra.tokens_per_second"] == 24.0 and metrics["load.4.hydra.first_token_p99_ms"] == 400.0
    assert len(metrics) == 10  # two of each contender at each level: a person sorts by them
    plot_concurrency(found, tmp_path / "load.png")
    assert [path.name for path in tmp_path.iterdir()] == ["load.png"]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_questions_from_all_over_the_list_and_again_where_they_are_few(plan: BenchPlan) -> None:
    questions = [Question(str(number), "all", (5, number)) for number in range(40)]
    of: list[int] = [request.prompt_ids[1] for request in make_requests(questions, 10, plan)]
    assert sorted(of) == list(range(0, 40, 4)) and of != sorted(of)
    many = make_requests(questions, 100, plan)
    assert len({request.id for request in many}) == 100
    assert all(2 <= sum(request.prompt_ids[1] == number for request in many) <= 3 for number in range(40))
    assert many == make_requests(questions, 100, plan)


def test_fewer_requests_than_are_to_be_in_flight(tiny_base_dir: Path, tmp_path: Path, heads: Path) -> None:
    with pytest.raises(InputError, match=r"bench\.concurrency_requests=2 is fewer than the 3 of bench\.concurrency"):
        config_for(tiny_base_dir, tmp_path, heads, bench__load_requests=2)
    with pytest.raises(InputError, match=r"bench\.concurrency\.1"):
        config_for(tiny_base_dir, tmp_path, heads, bench__concurrency=[1, 0])


# -- on a tiny base ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [1, 3])
def test_answers_are_those_of_requests_alone(plan: BenchPlan, tiny_base: Base, method: str, level: int) -> None:
    engine = Engine(tiny_base, *make_drafter(method, plan, tiny_base, measured=False), max_batch_size=level, context_limit=120)
    requests = make_requests(QUESTIONS, 8, plan)
    seen = run_closed_loop(engine, requests, level)
    assert len(seen.first_token) == len(seen.results) == 8 and seen.seconds > 0 and min(seen.between) > 0
    for request in requests:
        assert seen.results[request.id].token_ids == naive_generate(tiny_base, request).token_ids


def test_stopped_and_gone_on_with(plan: BenchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(plan, methods=("plain", "transformers", "hydra++"))  # whose step costs nobody has to measure
    path = Path(plan.concurrency_file)
    measure_concurrency(plan, QUESTIONS)
    rows = read_concurrency(path)
    assert [(row.round, row.level, row.method) for row in rows] == [
        (0, 1, "plain"), (0, 1, "hydra++"), (0, 3, "hydra++"), (0, 3, "plain"),
        (1, 1, "hydra++"), (1, 1, "plain"), (1, 3, "plain"), (1, 3, "hydra++")]
    assert all(row.seconds > 0 and row.steps <= row.row_steps <= row.level * row.steps for row in rows)
    found = summarise_concurrency(rows)
    assert {name: figures["identical"] for name, figures in found["3"].items()} == {"plain": 1.0, "hydra++": 1.0}
    assert found["1"]["hydra++"]["tokens_per_step"] > 1.2 and found["3"]["plain"]["rows_running"] > 1.5

    text = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(text[:6]) + text[6][:30], encoding="utf-8")  # as a kill leaves it
    measure_concurrency(plan, QUESTIONS)
    assert read_concurrency(path)[:6] == rows[:6]
    assert [(row.level, row.method, row.answers) for row in read_concurrency(path)] == [
        (row.level, row.method, row.answers) for row in rows]
    monkeypatch.setattr(BaseSection, "load", None)
    measure_concurrency(plan, QUESTIONS)  # nothing is left to do


def test_a_load_that_does_not_fit_is_told_before_anything_is_timed(plan: BenchPlan) -> None:
    plan = replace(plan, single=True, concurrency=(1, 10_000_000))
    words = r"bench\.concurrency: 10000000 requests at once with plain: .* GiB are free on cpu"
    with pytest.raises(InputError, match=words) as told:
        measure(plan, QUESTIONS)
    assert "\n" not in str(told.value)
    assert not Path(plan.rows_file).exists() and not Path(plan.concurrency_file).exists()


@pytest.mark.slow
def test_the_stage_alone_with_its_load(local_ray: None, tiny_base_dir: Path, heads: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("hello", "Count to ten.")), encoding="utf-8")
    config = config_for(tiny_base_dir, tmp_path, heads, bench__prompts=str(path), bench__load_requests=3)
    result = run_bench(config)
    load, folder = result.figures["load"], tmp_path / "runs" / "default" / "bench"
    assert {level: set(methods) for level, methods in load.items()} == {level: set(METHODS) for level in ("1", "3")}
    assert all(figures["identical"] == 1.0 for methods in load.values() for figures in methods.values())
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["load"] == load
    assert "| 3 | combined |" in (folder / "report.md").read_text(encoding="utf-8")
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert {"load.jsonl", "load.png"} <= set(files)
    client = MlflowClient(Tracker.open(config).uri)
    assert client.get_run(result.run_id).data.metrics["load.3.combined.tokens_per_second"] > 0
    assert "load.png" in {entry.path.split("/")[-1] for entry in client.list_artifacts(result.run_id)}
    assert run_bench(config).skipped
