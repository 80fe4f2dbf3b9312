"""Every contender on the same prompts: figures by hand, and the stage itself on a tiny base, stopped and gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base, load_base
from hydra_core.decoding import naive_generate
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from pipelines.bench.latency import make_contenders
from pipelines.bench.losslessness import LosslessnessRow, read_losslessness
from pipelines.bench.plan import Question, Row, read_rows
from pipelines.bench.questions import prompt_of
from pipelines.bench.report import method_table, summarise
from pipelines.bench.results import bench_label
from pipelines.bench.stage import _plan as bench_plan
from pipelines.bench.stage import load_questions, run_bench
from pipelines.bench.throughput import BatchRow, make_requests, summarise_batches
from pipelines.config import RunConfig, load_config
from pipelines.promote.stage import run_promote
from pipelines.rows.parquet_parts import write_part
from pipelines.rows.schemas import PROMPTS
from pipelines.runtime.artifacts import RunPaths, StageResult, stage_folder
from pipelines.tracking import Tracker
from tests.broken_heads import break_heads
from tests.decisions import choose_winner
from tests.trained import overfit_heads

SPEC_BENCH = [{"question_id": 81, "category": "writing", "turns": ["first turn", "second turn"]},
              {"question_id": 300, "category": "rag", "turns": ["only turn"]}]


def row(method: str, question: str, tokens: int, seconds: float, *, steps: int | None = None, answer: int = 0,
        **more: Any) -> Row:
    """`tokens` tokens (the first one ends the prefill, which takes a fifth of `seconds`)."""
    return Row(**{"round": 0, "question": question, "category": "all", "method": method, "token_ids": (answer,) * tokens,
                  "steps": tokens - 1 if steps is None else steps, "prefill_seconds": seconds / 5,
                  "decode_seconds": seconds * 4 / 5, **more})


def test_figures_by_hand() -> None:
    rows = [row("plain", "a", 11, 1.0), row("plain", "b", 21, 1.0),
            row("hydra", "a", 11, 0.5, steps=5), row("hydra", "b", 21, 0.25, steps=10, answer=1),
            row("transformers", "a", 11, 2.0), row("transformers", "b", 21, 4.0)]
    identity = [LosslessnessRow("a", "hydra", "fp32", 1, "identical"),
                LosslessnessRow("b", "hydra", "fp32", 8, "near-tie", 3, 1e-6),
                LosslessnessRow("a", "plain", "fp32", 1, "different", 0, 2.0),
                LosslessnessRow("b", "hydra", "bf16", 0, "different", 0, 2.0)]
    found = summarise(rows, identity)
    assert found["plain"]["tokens_per_step"] == found["plain"]["speed_vs_plain"] == found["plain"]["identical"] == 1.0
    hydra = found["hydra"]
    assert (hydra["rows"], hydra["tokens"], hydra["tokens_per_step"], hydra["identical"]) == (2, 32, 2.0, 0.5)
    assert hydra["speed_vs_plain"] == pytest.approx((11 / 0.5 + 21 / 0.25) / (11 + 21), abs=1e-3)
    assert hydra["speed_vs_transformers"] == pytest.approx((11 / 0.5 + 21 / 0.25) / (11 / 2 + 21 / 4), abs=1e-3)
    assert hydra["decode_speed_vs_plain"] == pytest.approx((10 / 0.4 + 20 / 0.2) / (10 / 0.8 + 20 / 0.8), abs=1e-3)
    low, high = hydra["spread"]
    assert 2.0 == low <= hydra["speed_vs_plain"] <= high == 4.0
    assert hydra["fp32"] == {"answers": 2, "identical": 1, "near_tie": 1, "different": 0}
    assert hydra["differing"] == {"answers": 1, "identical": 0, "near_tie": 0, "different": 1}
    assert found["plain"]["fp32"]["different"] == 1 and found["transformers"]["fp32"] is None
    cells = method_table(found, "all", "bf16").rows
    assert [row[0] for row in cells] == ["hydra", "plain", "transformers"]
    assert cells[0][6:] == ("50 %, 1 not near-ties", "1 + 1 near-ties of 2")


def test_throughput_by_hand() -> None:
    rows = [BatchRow(0, "equal", "transformers", 4, 100, 10.0), BatchRow(0, "equal", "plain", 4, 100, 5.0),
            BatchRow(1, "equal", "transformers", 4, 100, 20.0), BatchRow(1, "equal", "plain", 4, 100, 5.0),
            BatchRow(2, "equal", "transformers", 4, 100, 10.0), BatchRow(2, "equal", "plain", 4, 100, 4.0)]
    plain = summarise_batches(rows)["equal"]["plain"]
    assert plain["speed_vs_transformers"] == 2.5 and plain["range"] == [2.0, 4.0]
    assert plain["tokens_per_second"] == pytest.approx((20 + 20 + 25) / 3, abs=0.1)
    job = summarise_batches([*rows, BatchRow(0, "equal", "engine", 4, 100, 4.0), BatchRow(0, "equal", "batch", 4, 100, 5.0)])
    assert job["equal"]["batch"]["speed_vs_engine"] == 0.8 and "speed_vs_engine" not in job["equal"]["engine"]


def test_ragged_limits_depend_on_the_place_alone() -> None:
    questions = [Question(str(i), "all", (5,)) for i in range(64)]
    limits = [request.max_new_tokens for request in make_requests(questions, "ragged", 9, 500)]
    assert limits == [request.max_new_tokens for request in make_requests(questions, "ragged", 99, 500)]
    assert min(limits) >= 16 and max(limits) <= 400 and len(set(limits)) > 40
    assert {request.max_new_tokens for request in make_requests(questions, "equal", 9, 500)} == {9}
    assert max(request.max_new_tokens for request in make_requests(questions, "ragged", 9, 100)) == 99


def verdicts(different: int) -> dict[str, int]:
    return {"answers": 8, "identical": 8 - different, "near_tie": 0, "different": different}


def figures(speed: float | None, different: int | None = 0, timed: int = 0, int4: int = 0) -> dict[str, object]:
    fp32 = None if different is None else verdicts(different)
    return {"speed_vs_plain": speed, "tokens_per_step": 2.0, "fp32": fp32, "differing": verdicts(timed),
            "naive": {"fp32": fp32, "int4": verdicts(int4)}}


@pytest.mark.parametrize(("methods", "winner", "word"), [
    ({"hydra": figures(1.4), "ngram": figures(1.6)}, "ngram", "1.60x"),
    ({"hydra": figures(1.4), "ngram": figures(1.6, different=1)}, "hydra", "not shown to be lossless: ngram"),
    ({"hydra": figures(1.4), "ngram": figures(1.6, timed=1)}, "hydra", "not shown to be lossless: ngram"),
    ({"hydra": figures(1.4), "ngram": figures(1.6, int4=1)}, "hydra", "not shown to be lossless: ngram"),
    ({"hydra": figures(1.4, different=None)}, "plain", "not considered"),
    ({"hydra": figures(1.4), "medusa": figures(1.2), "combined": figures(1.8)}, "combined", "1.80x"),
    ({"hydra": figures(1.4), "medusa": figures(1.2), "combined": figures(1.8, different=1)}, "hydra", "lossless: combined"),
    ({"hydra": figures(0.9)}, "plain", "no lossless contender"),
    ({"hydra": figures(None)}, "plain", "no lossless contender"),
    ({}, "plain", "no lossless contender"),
    ({"transformers": figures(3.0, different=None)}, "plain", "no lossless contender"),
    ({"llama.cpp": figures(3.0, different=None), "hydra@8": figures(3.0, different=None)}, "plain",
     "not considered, since not shown to be lossless: hydra@8"),
])
def test_the_fastest_lossless_contender_wins(methods: dict[str, object], winner: str, word: str) -> None:
    name, why = choose_winner({"plain": figures(1.0), **methods}, 1.0)
    assert name == winner and word in why


def test_a_quantised_base_is_judged_in_its_own_format() -> None:
    """It has no fp32 form. For any other base its own format alone proves nothing."""
    own = figures(1.4, different=None) | {"naive": {"bf16": verdicts(0)}}
    wrong = figures(1.9, different=None) | {"naive": {"bf16": verdicts(1)}}
    methods = {"plain": figures(1.0, different=None), "hydra": own, "ngram": wrong}
    assert choose_winner(methods, 1.0, "bf16")[0] == "hydra"
    assert choose_winner(methods, 1.0)[0] == "plain"
    timed = figures(1.4, different=None, timed=1) | {"naive": own["naive"]}
    assert choose_winner({"plain": figures(1.0), "hydra": timed}, 1.0, "bf16")[0] == "plain"


def test_a_gain_too_small_to_bother_and_no_plain() -> None:
    assert choose_winner({"plain": figures(1.0), "ngram": figures(1.02)}, 1.05)[0] == "plain"
    with pytest.raises(InputError, match="plain"):
        choose_winner({"ngram": figures(2.0)}, 1.0)


@pytest.fixture(scope="module")
def heads(tiny_base: Base, tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of heads that know the answers to the Spec-Bench prompts above."""
    config = config_for(tiny_base_dir, tmp_path_factory.mktemp("questions"), SPEC_BENCH)
    drafter = overfit_heads(tiny_base, "hydra", [question.prompt_ids for question in load_questions(config)[0]])
    folder = tmp_path_factory.mktemp("heads") / "heads"
    save_checkpoint(folder, drafter, tiny_base.identity, TreeSet({1: DraftTree(((0,), (1,), (0, 0), (0, 0, 0)))}), {})
    return folder


def config_for(base_dir: Path, folder: Path, rows: list[dict[str, object]], **changes: object) -> RunConfig:
    """Rows go into a file of `folder`, which is the storage too."""
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows), encoding="utf-8")
    values = {"storage": str(folder), "base.model": str(base_dir), "base.dtype": "fp32", "bench.prompts": str(path),
              "bench.max_new_tokens": 12, "bench.identity_prompts": 2, "bench.threads": 1}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def test_questions_of_every_kind(tiny_base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*SPEC_BENCH, {"prompt": "hello"}, {"prompt": "long " * 200}, {"other": 1}, {"prompt": "x", "question_id": 81}]
    found, errors = load_questions(config_for(tiny_base_dir, tmp_path, rows))
    assert [(q.id, q.category) for q in found] == [("81", "conversation"), ("300", "rag"), ("3", "all"), ("81#6", "all")]
    told = capsys.readouterr().err
    assert "row 4: prompt: has" in told and "row 5: has no field `prompt`" in told
    assert "6 prompts read = 4 ok + 2 errors" in told
    path = str(tmp_path / "questions.jsonl")
    assert [(error["id"], error["stage"]) for error in errors] == [(f"{path}:4", "bench"), (f"{path}:5", "bench")]
    assert "has room for 255" in errors[0]["message"]
    assert len(load_questions(config_for(tiny_base_dir, tmp_path, rows, bench__limit=2))[0]) == 2


def test_held_out_prompts_that_do_not_fit_are_left_out(tiny_base_dir: Path, tmp_path: Path) -> None:
    config = load_config(None, {"storage": str(tmp_path), "base.model": str(tiny_base_dir), "base.context_limit": 40})
    folder = RunPaths.of(config).stage("distill")
    with stage_folder(config, "distill", folder, "f") as stage:
        rows = [{"prompt_id": name, "messages": None, "prompt": name, "prompt_ids": [5] * length, "source": "s/1",
                 "split": "held_out"} for name, length in (("long", 40), ("short", 39))]
        part = write_part(folder / "prompts", rows, PROMPTS, key="prompt_id")
        stage.finish(StageResult("distill", None, {}, {}), [part])
    questions, errors = load_questions(config)
    assert [question.id for question in questions] == ["short"] and len(errors) == 1
    assert "has 40 tokens, the context has room for 39" in errors[0]["message"]


def test_files_without_a_usable_prompt(tiny_base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is empty"):
        load_questions(config_for(tiny_base_dir, tmp_path, []))
    with pytest.raises(InputError, match=r"questions\.jsonl: has no usable prompt: row 1: prompt: has"):
        load_questions(config_for(tiny_base_dir, tmp_path, [{"prompt": "long " * 200}]))
    with pytest.raises(InputError, match="distill"):
        load_questions(load_config(None, {"storage": str(tmp_path), "base.model": str(tiny_base_dir)}))


def test_mistakes_are_told_before_anything_runs(tiny_base_dir: Path, tmp_path: Path) -> None:
    make: Callable[..., RunConfig] = lambda **changes: config_for(tiny_base_dir, tmp_path, SPEC_BENCH, **changes)  # noqa: E731
    with pytest.raises(InputError, match=r"is none of plain, transformers, transformers-lookup, ngram, llama\.cpp"):
        run_bench(make(bench__methods=["hydra++"]))
    with pytest.raises(InputError, match="is not a heads checkpoint"):
        run_bench(make(bench__heads=str(tmp_path)))
    with pytest.raises(InputError, match=r"base\.context_limit=999"):
        run_bench(make(base__context_limit=999))
    with pytest.raises(InputError, match="no such file"):
        run_bench(make(bench__prompts=str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("damage", "words"), [
    ("no tensors", "model.safetensors is missing"), ("no tree", "tree.json is missing"), ("truncated", "truncated"),
    ("missing key", "is missing"), ("extra key", "unexpected tensor extra"), ("misshapen key", "has shape"),
    ("another base", "belong to base")])
def test_broken_heads_are_told_before_anything_runs(heads: Path, tiny_base_dir: Path, tmp_path: Path, damage: str,
                                                    words: str) -> None:
    broken = break_heads(heads, tmp_path / "broken", damage)
    with pytest.raises(InputError, match=rf"bench\.heads[:=].*{words}"):
        run_bench(config_for(tiny_base_dir, tmp_path, SPEC_BENCH, bench__heads=str(broken)))
    assert not (tmp_path / "runs").exists()


def test_transformers_is_greedy_and_keeps_within_the_context(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Whatever a generation config says: penalties, suppressed tokens, a least length."""
    base_dir = shutil.copytree(tiny_base_dir, tmp_path / "base")
    path = base_dir / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "repetition_penalty": 9.0, "min_length": 30,
                                "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 7.0}), encoding="utf-8")
    base = load_base(str(base_dir), dtype="fp32", cache=tmp_path, context_limit=60)
    config = config_for(base_dir, tmp_path, SPEC_BENCH, base__context_limit=60, bench__max_new_tokens=99)
    plan = bench_plan(config, tmp_path, ("plain", "transformers"), {})
    contenders = make_contenders(plan, base, 60)
    for question in load_questions(config)[0]:
        wanted = naive_generate(base, Request("r", question.prompt_ids, 99))
        assert wanted.finish_reason == "context"
        for method in ("transformers", "plain"):
            assert contenders[method](question.prompt_ids, 99).token_ids == wanted.token_ids
        short = naive_generate(base, Request("r", question.prompt_ids, 9)).token_ids
        assert contenders["transformers"](question.prompt_ids, 9).token_ids == short


def untimed(entry: Row) -> dict[str, Any]:
    return {name: value for name, value in vars(entry).items() if not name.endswith("seconds")}


@pytest.mark.slow
def test_stopped_and_gone_on_with(local_ray: None, tiny_base_dir: Path, tiny_base: Base, heads: Path,
                                  tmp_path: Path) -> None:
    config = config_for(tiny_base_dir, tmp_path, [*SPEC_BENCH, {"other": 1}], bench__heads=str(heads), bench__batch_prompts=2,
                        bench__max_batch_size=2, bench__batch_job=True, serve__model="plain", base__context_limit=200)
    result = run_bench(config)
    folder = tmp_path / "runs" / "default" / "bench"
    assert set(result.figures["methods"]) == {"plain", "transformers", "ngram", "hydra", "combined"}
    hydra = result.figures["methods"]["hydra"]
    assert hydra["identical"] == 1.0 and hydra["rows"] == 3 and hydra["tokens_per_step"] > 1.2  # one has a second turn
    assert sum(hydra["accepted_lengths"][1:]) > 0 and hydra["measured_vs_predicted"] > 0 and hydra["draft_ms"] > 0
    assert hydra["fp32"] == {"answers": 4, "identical": 4, "near_tie": 0, "different": 0}  # alone and in a batch
    assert result.figures["batch"].keys() == {"equal", "ragged"}
    assert {name: f["tokens"] for name, f in result.figures["batch"]["equal"].items()} == dict.fromkeys(
        ("plain", "transformers", "ngram", "hydra", "combined", "engine", "batch"), 24)
    assert result.figures["batch"]["equal"]["batch"]["speed_vs_engine"] > 0
    assert len({f["tokens"] for f in result.figures["batch"]["ragged"].values()}) == 1  # greedy: all say the same
    assert (result.figures["questions"], result.figures["errors"]) == (2, 1)
    (error,) = (json.loads(line) for line in (folder / "errors.jsonl").read_text(encoding="utf-8").splitlines())
    assert "row 3: has no field `prompt`" in error["message"]
    assert "errors.jsonl" in json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    inputs = MlflowClient(Tracker.open(config).uri).get_run(result.run_id).inputs.dataset_inputs
    assert {found.dataset.name for found in inputs} == {"prompts", "hydra heads", bench_label(config)}
    questions = {question.id: question for question in load_questions(config)[0]}
    before = read_rows(folder / "rows.jsonl")
    answers: dict[str, tuple[int, ...]] = {}
    for entry in before:
        prompt = prompt_of(questions[entry.question], [answers[entry.question]] if entry.turn else [], tiny_base, 200)
        assert entry.token_ids == naive_generate(tiny_base, Request("r", prompt, 12)).token_ids
        answers.setdefault(entry.question, entry.token_ids)
    assert [entry.turn for entry in before if entry.method == "hydra"] == [0, 1, 0]
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    for figure in ("report.png", "categories.png", "accepted.png"):
        assert figure in listed and (folder / figure).read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["memory"]["resident_peak_bytes"] > 2**27
    told = (folder / "report.md").read_text(encoding="utf-8")
    assert "| hydra |" in told and "Milliseconds of a step" in told and "Peak resident memory" in told
    metrics = MlflowClient(Tracker.open(config).uri).get_run(result.run_id).data.metrics
    assert {"hydra.tokens_per_step", "tokens_per_step", "speed_vs_plain", "speed_vs_plain_low"} <= metrics.keys()
    assert len(metrics) <= 32
    parent = MlflowClient(Tracker.open(config).uri).get_run(Tracker.open(config).parent()).data
    assert parent.metrics["speed_vs_plain"] == metrics["speed_vs_plain"] and parent.tags["fastest"]
    assert run_bench(config).skipped

    # as a kill leaves it: no manifest, the last row cut in the middle, identity half done
    (folder / "manifest.json").unlink()
    text = (folder / "rows.jsonl").read_text(encoding="utf-8")
    (folder / "rows.jsonl").write_text(text[:-40], encoding="utf-8")
    lines = (folder / "identity.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "identity.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    assert not run_bench(config).skipped
    after = read_rows(folder / "rows.jsonl")
    assert after[:len(before) - 1] == before[:-1] and len(after) == len(before)  # finished rows are not run again
    assert untimed(after[-1]) == untimed(before[-1])
    assert len(read_losslessness(folder / "identity.jsonl")) == len(lines)

    promoted = run_promote(config)
    methods = json.loads((folder / "report.json").read_text(encoding="utf-8"))["methods"]
    assert promoted.figures["champion"] == choose_winner(methods, 1.0)[0] and promoted.figures["version"] == 1
    assert run_promote(config).skipped
    (folder / "rows.jsonl").unlink()
    other = config_for(tiny_base_dir, tmp_path, SPEC_BENCH, bench__heads=str(heads), bench__max_new_tokens=5,
                       bench__methods=["ngram"], bench__champion=False, bench__identity_prompts=1, base__context_limit=200)
    beside = Path(run_bench(other).outputs["report"]).parent  # of other settings: a result of its own
    assert beside.parent == folder and beside.name.startswith("questions-") and run_bench(other).skipped
    assert {entry.method for entry in read_rows(beside / "rows.jsonl")} == {"plain", "ngram"}
    assert not (folder / "rows.jsonl").exists() and (folder / "report.json").exists()


@pytest.mark.slow
def test_identity_alone_in_other_formats(local_ray: None, tiny_base_dir: Path, heads: Path, tmp_path: Path) -> None:
    """Nothing is timed one request at a time; every format has its own naive loop."""
    result = run_bench(config_for(tiny_base_dir, tmp_path, SPEC_BENCH, bench__heads=str(heads), bench__single=False,
                                  bench__identity_formats=["fp32", "bf16"], bench__methods=["ngram", "combined"]))
    methods = result.figures["methods"]
    assert set(methods) == {"plain", "ngram", "combined"} and not read_rows(tmp_path / "runs/default/bench/rows.jsonl")
    for values in methods.values():
        assert values["rows"] == 0 and values["speed_vs_plain"] is None and values["fp32"]["identical"] == 4
        assert values["naive"].keys() == {"fp32", "bf16"} and values["naive"]["bf16"]["answers"] == 4


@pytest.mark.slow
def test_sampled_with_and_without_the_draws_own_noise(local_ray: None, tiny_base_dir: Path, heads: Path,
                                                      tmp_path: Path) -> None:
    reached = {}
    for shared in (True, False):
        result = run_bench(config_for(tiny_base_dir, tmp_path, SPEC_BENCH, bench__heads=str(heads), name=f"noise-{shared}",
                                      bench__temperature=1.0, bench__max_new_tokens=40, bench__shared_noise=shared))
        methods = result.figures["methods"]
        assert set(methods) == {"plain", "ngram", "hydra", "combined"} and methods["hydra"]["identical"] == 1.0
        assert methods["hydra"]["fp32"] is None
        reached[shared] = methods["hydra"]["tokens_per_step"]
    assert reached[True] > reached[False]


@pytest.mark.slow
def test_a_changed_report_is_made_again_from_the_rows_that_stand(local_ray: None, tiny_base_dir: Path,
                                                                 tmp_path: Path) -> None:
    config = config_for(tiny_base_dir, tmp_path, SPEC_BENCH, bench__methods=["ngram"], bench__identity_prompts=1)
    run_bench(config)
    folder = tmp_path / "runs" / "default" / "bench"
    rows = (folder / "rows.jsonl").read_bytes()
    (folder / "report.md").write_text("no report", encoding="utf-8")
    assert not run_bench(config).skipped and "no report" not in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "rows.jsonl").read_bytes() == rows
