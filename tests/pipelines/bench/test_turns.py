"""A second turn follows plain's answer, for every contender, and after a stop too; sizes of trees as contenders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.decoding import naive_generate
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from pipelines.bench import latency as bench_run
from pipelines.bench.inputs import bench_fingerprint
from pipelines.bench.latency import measure_single
from pipelines.bench.losslessness import check_differences, read_losslessness
from pipelines.bench.plan import BenchPlan, Outcome, Question, make_drafter, read_rows, sweep_tree
from pipelines.bench.questions import load_questions, prompt_of, room_for_turns, turns_of
from pipelines.bench.stage import _plan, run_bench
from pipelines.config import RunConfig, load_config
from tests.trained import random_heads

ROWS = [{"question_id": 7, "category": "writing", "turns": ["one", "two", "three"]},
        {"question_id": 8, "category": "rag", "turns": ["alone"]}]
TREES = {"2": [[0]], "4": [[0], [1], [0, 0]]}


def config_for(base_dir: Path, folder: Path, **changes: object) -> RunConfig:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in ROWS), encoding="utf-8")
    values = {"storage": str(folder), "base.model": str(base_dir), "base.dtype": "fp32", "bench.prompts": str(path),
              "bench.max_new_tokens": 12, "bench.identity_prompts": 0, "bench.threads": 1}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def plan_of(config: RunConfig, folder: Path, *methods: str, heads: dict[str, str] | None = None) -> BenchPlan:
    return _plan(config, folder / "bench", methods, heads or {})


@pytest.fixture
def heads(tiny_base: Base, tmp_path: Path) -> Path:
    """A checkpoint with trees of two sizes beside its own."""
    folder = tmp_path / "heads"
    save_checkpoint(folder, random_heads(tiny_base, "hydra"), tiny_base.identity, TreeSet({1: DraftTree(((0,), (0, 0)))}), {})
    (folder / "sweep.json").write_text(json.dumps(TREES), encoding="utf-8")
    return folder


def test_a_later_turn_is_put_together_from_texts(tiny_base: Base) -> None:
    question = Question("7", "all", (5, 6), ("one", "two", "three"))
    assert prompt_of(question, [], tiny_base, 99) == (5, 6)
    said = tuple(tiny_base.encode_prompt("ok")[7:9])  # two bytes, in the middle of their turn
    text = tiny_base.decode(said)
    wanted = [{"role": "user", "content": "one"}, {"role": "assistant", "content": text}, {"role": "user", "content": "two"}]
    for answer in (said, (*said, tiny_base.stop_ids[0])):  # the token that ends an answer is no part of its text
        assert prompt_of(question, [answer], tiny_base, 200) == tuple(tiny_base.encode_prompt(messages=wanted))
    third = prompt_of(question, [said, said], tiny_base, 200)
    assert tiny_base.decode(third).count(text) == 2 and "three" in tiny_base.decode(third)
    with pytest.raises(InputError, match=f"has {len(third)} tokens, there is room for {len(third) - 1}"):
        prompt_of(question, [said, said], tiny_base, len(third))
    assert len(prompt_of(question, [said, said], tiny_base, len(third) + 1)) == len(third)


def test_as_many_turns_as_asked_for(tiny_base_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    for asked, wanted in ((1, [1, 1]), (2, [2, 1]), (9, [3, 1])):
        questions, _ = load_questions(config_for(tiny_base_dir, tmp_path, bench__turns=asked))
        assert [len(turns_of(question)) for question in questions] == wanted
        room = room_for_turns(tiny_base, 12, questions)
        assert room >= len(questions[0].prompt_ids) + 12 * wanted[0] and room <= tiny_base.context_limit
    assert list(turns_of(Question("1", "all", (5,)))) == [0]


def test_every_contender_on_plains_context(tiny_base_dir: Path, tiny_base: Base, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that says something else does not change what comes next."""
    config = config_for(tiny_base_dir, tmp_path, bench__rounds=2)
    questions, _ = load_questions(config)
    plan = plan_of(config, tmp_path, "plain", "liar")
    seen: list[tuple[str, tuple[int, ...]]] = []
    make = bench_run.make_contenders

    def contenders(plan: BenchPlan, base: Base, room: int, _: object) -> dict[str, Callable[[tuple[int, ...], int], Outcome]]:
        plain = make(replace(plan, methods=("plain",)), base, room)["plain"]

        def noted(method: str, prompt_ids: tuple[int, ...], limit: int) -> Outcome:
            seen.append((method, prompt_ids))
            found = plain(prompt_ids, limit)
            return found if method == "plain" else replace(found, token_ids=(70, 71))

        return {method: lambda ids, limit, method=method: noted(method, ids, limit) for method in plan.methods}

    monkeypatch.setattr(bench_run, "make_contenders", contenders)
    measure_single(plan, questions)
    first = questions[0].prompt_ids
    answer = naive_generate(tiny_base, Request("r", first, 12)).token_ids
    second = prompt_of(questions[0], [answer], tiny_base, 250)
    alone = questions[1].prompt_ids
    assert seen[2:] == [("plain", first), ("liar", first), ("plain", second), ("liar", second),
                        ("liar", alone), ("plain", alone),
                        ("liar", first), ("plain", first), ("liar", second), ("plain", second),
                        ("plain", alone), ("liar", alone)]  # after the warm-up; taking turns at being first
    rows = read_rows(Path(plan.rows_file))
    assert [(row.round, row.question, row.turn) for row in rows if row.method == "plain"] == [
        (0, "7", 0), (0, "7", 1), (0, "8", 0), (1, "7", 0), (1, "7", 1), (1, "8", 0)]

    for _ in range(2):  # each answer that differs gets one verdict, with the prompt that its turn had
        check_differences(plan, questions, rows)
    verdicts = read_losslessness(Path(plan.losslessness_file))
    assert [(row.question, row.turn, row.method, row.verdict) for row in verdicts] == [
        ("7", 0, "liar", "different"), ("7", 1, "liar", "different"), ("8", 0, "liar", "different")]

    seen.clear()  # nothing is done twice
    measure_single(plan, questions)
    assert not seen
    lines = Path(plan.rows_file).read_text(encoding="utf-8").splitlines(keepends=True)
    for kept in (1, 2, 3, 5):  # killed in the middle of a question, between its turns too
        Path(plan.rows_file).write_text("".join(lines[:kept]) + lines[kept][:30], encoding="utf-8")
        seen.clear()
        measure_single(plan, questions)
        assert len(seen) == 2 + len(lines) - kept
        again = read_rows(Path(plan.rows_file))
        assert [(row.token_ids, row.turn, row.method) for row in again] == [(row.token_ids, row.turn, row.method) for row in rows]
    Path(plan.rows_file).write_text("".join(lines[:5]), encoding="utf-8")
    machine = Path(plan.rows_file).with_name(bench_run.MACHINE)
    machine.write_text(machine.read_text(encoding="utf-8").replace('"threads"', '"of another"'), encoding="utf-8")
    seen.clear()  # what another machine timed cannot be compared with what this one will time
    measure_single(plan, questions)
    assert len(seen) == 2 + len(lines) and len(read_rows(Path(plan.rows_file))) == len(lines)


def test_a_turn_that_does_not_fit_is_left_out(tiny_base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(tiny_base_dir, tmp_path, base__context_limit=40)
    plan = plan_of(config, tmp_path, "plain")
    measure_single(plan, load_questions(config)[0])
    assert [(row.question, row.turn) for row in read_rows(Path(plan.rows_file))] == [("7", 0), ("8", 0)]
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(told) == 1 and told[0].startswith("bench: question 7: turn 2: prompt: has") and "room for 39" in told[0]


def test_rows_of_older_files_are_first_turns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"round": 0, "question": "7", "category": "all", "method": "plain", "token_ids": [5, 2],
                                "steps": 1, "drafted": 0, "accepted": 0, "prefill_seconds": 0.1, "decode_seconds": 0.2}),
                    encoding="utf-8")
    (row,) = read_rows(path)
    assert (row.turn, row.token_ids, row.accepted_lengths, row.draft_seconds) == (0, (5, 2), (), 0.0)


def test_trees_of_other_sizes(heads: Path, tiny_base_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    assert sweep_tree(heads, 9).for_batch(1).size == sweep_tree(heads, 4).for_batch(1).size == 4
    assert sweep_tree(heads, 3).for_batch(64).size == 2
    with pytest.raises(InputError, match=r"@1: .*sweep\.json has trees of 2, 4 nodes: ask for more"):
        sweep_tree(heads, 1)
    config = config_for(tiny_base_dir, tmp_path)
    plan = plan_of(config, tmp_path, "plain", "hydra", "hydra@4", heads={"hydra": str(heads)})
    assert [make_drafter(method, plan, tiny_base)[1] for method in plan.methods[1:]] == [
        TreeSet({1: DraftTree(((0,), (0, 0)))}), TreeSet({1: DraftTree(((0,), (1,), (0, 0)))})]
    questions, _ = load_questions(config)
    measure_single(plan, questions)
    rows = read_rows(Path(plan.rows_file))
    answers = {(row.question, row.turn): row.token_ids for row in rows if row.method == "plain"}
    for row in rows:
        assert row.token_ids == answers[row.question, row.turn] and row.predicted_seconds > 0
        assert row.drafted == row.steps * {"plain": 0, "hydra": 2, "hydra@4": 3}[row.method]
        assert sum(row.accepted_lengths) == row.steps and row.verify_seconds > 0
        assert row.draft_seconds + row.verify_seconds + row.accept_seconds + row.commit_seconds <= row.decode_seconds


def test_mistakes_in_sizes(heads: Path, tiny_base_dir: Path, tmp_path: Path) -> None:
    def make(*methods: str) -> RunConfig:
        return config_for(tiny_base_dir, tmp_path, bench__heads=str(heads), bench__methods=methods)

    for method in ("medusa@8", "hydra@", "hydra@x", "hydra@-1", "plain@8", "combined@8"):
        with pytest.raises(InputError, match=f"'{method}' is none of .* nor NAME@N"):
            run_bench(make(method))
    with pytest.raises(InputError, match=r"@0: .* ask for more"):
        run_bench(make("hydra@0"))
    before = bench_fingerprint(make("hydra@4"), {"hydra": str(heads)})
    without = bench_fingerprint(make("hydra"), {"hydra": str(heads)})
    (heads / "sweep.json").write_text(json.dumps({"2": [[1]]}), encoding="utf-8")
    assert bench_fingerprint(make("hydra@4"), {"hydra": str(heads)}) != before  # other trees are other work
    assert bench_fingerprint(make("hydra"), {"hydra": str(heads)}) == without
    for damage in ("{", '{"2": [[0, 0]]}'):
        (heads / "sweep.json").write_text(damage, encoding="utf-8")
        with pytest.raises(InputError, match=r"sweep\.json"):
            run_bench(make("hydra@4"))
    (heads / "sweep.json").unlink()
    with pytest.raises(InputError, match=r"sweep\.json is missing: run `hydra-heads tree` again"):
        run_bench(make("hydra@4"))
    assert not (tmp_path / "runs").exists()


