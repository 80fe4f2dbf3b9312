"""vLLM's contenders: a stand-in for its package in the real process, and vLLM itself where a Python has it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.decoding import compare, naive_generate
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from pipelines.bench.concurrency import read_concurrency, summarise_concurrency
from pipelines.bench.concurrency_report import concurrency_table
from pipelines.bench.inputs import bench_fingerprint, find_methods
from pipelines.bench.latency import measure
from pipelines.bench.losslessness import read_losslessness
from pipelines.bench.plan import BenchPlan, Question, drafts_in_vllm, read_rows, reference_of
from pipelines.bench.report import method_table, summarise
from pipelines.bench.stage import _plan as make_plan
from pipelines.bench.stage import run_bench
from pipelines.bench.throughput import read_batches
from pipelines.bench.vllm_contender import VllmPool, outcome_of
from pipelines.bench.vllm_setup import check_vllm, find_environment, vllm_environment
from pipelines.compare.paired import paired_results
from pipelines.config import RunConfig, load_config
from pipelines.promote.stage import run_promote
from pipelines.tracking import Tracker
from tests.conftest import ROOT
from tests.tiny import save_tiny
from tests.trained import overfit_heads, random_heads, random_prompts

METHODS = ("plain", "vllm", "vllm+ngram", "vllm+hydra")
QUESTIONS = [Question(str(number), "all", prompt) for number, prompt in enumerate(random_prompts(3))]
STAND_IN = ROOT / "tests" / "stand_in_vllm"
WIDE = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, initializer_range=0.15)
"""vLLM's attention on a CPU wants heads of 32."""


def following(token: int) -> int:
    """The stand-in's next token."""
    return (token * 7 + 5) % 256 + 3


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in is what a new Python imports as vllm; the file in which it writes what it was asked."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (STAND_IN, ROOT))))
    monkeypatch.setenv("STAND_IN_SEEN", str(tmp_path / "seen.jsonl"))
    return tmp_path / "seen.jsonl"


@pytest.fixture
def heads(tiny_base: Base, tmp_path: Path) -> dict[str, str]:
    found = {}
    for kind in ("hydra", "hydra++"):
        found[kind] = str(tmp_path / kind)
        save_checkpoint(tmp_path / kind, random_heads(tiny_base, kind), tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    return found


def config_for(base_dir: Path, folder: Path, **changes: object) -> RunConfig:
    values = {"storage": str(folder), "base.model": str(base_dir), "base.dtype": "fp32", "base.context_limit": 120,
              "bench.max_new_tokens": 12, "bench.identity_prompts": 0, "bench.threads": 1, "bench.turns": 1}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def plan_for(base_dir: Path, folder: Path, heads: dict[str, str], methods: tuple[str, ...] = METHODS,
             **changes: object) -> BenchPlan:
    (folder / "bench").mkdir(exist_ok=True)
    return make_plan(config_for(base_dir, folder, **changes), folder / "bench", methods, heads)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def python_that_says(folder: Path, **about: Any) -> str:
    """A Python that has what it says."""
    path = folder / "python"
    told = {"vllm": True, "plugin": True, "prefix": "/nowhere"} | about
    path.write_text(f"#!/bin/sh\necho '{json.dumps(told)}'\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


# -- names -------------------------------------------------------------------------------------------------------------

def test_names(tiny_base_dir: Path, tmp_path: Path) -> None:
    heads = {"hydra": "h", "bundled": "b"}
    make = lambda *methods, **more: find_methods(config_for(tiny_base_dir, tmp_path, bench__methods=methods, **more), heads)  # noqa: E731
    assert make("vllm+hydra@2", "ngram", "vllm+ngram", "vllm+bundled") == (
        "plain", "vllm", "vllm+hydra@2", "ngram", "vllm+ngram", "vllm+bundled")
    assert make("ngram", "vllm") == ("plain", "ngram", "vllm") and not any("vllm" in name for name in make())
    for wrong in ("vllm+medusa", "vllm+plain", "vllm@2", "vllm+hydra@0", "vllm+", "vllmhydra"):
        with pytest.raises(InputError, match=r"is none of plain.*vllm, vllm\+ngram, vllm\+hydra, vllm\+bundled"):
            make(wrong)
    with pytest.raises(InputError, match="is none of"):  # which samples otherwise
        make("vllm", bench__temperature=1.0)
    assert [drafts_in_vllm(name, heads) for name in ("vllm", "vllm+ngram", "vllm+hydra@3")] == [
        (None, None), ("ngram", None), ("hydra", 3)]
    assert [reference_of(name) for name in ("plain", "hydra", "llama.cpp", "vllm", "vllm+ngram")] == [
        "plain", "plain", "plain", "plain", "vllm"]


def test_earlier_benches_are_still_found(tiny_base_dir: Path, tmp_path: Path) -> None:
    """Settings that came later count only where they are set."""
    prints = [bench_fingerprint(config_for(tiny_base_dir, tmp_path, **changes), {}) for changes in (
        {}, {"bench__vllm_python": None, "bench__vllm_settings": {}}, {"bench__vllm_settings": {"enforce_eager": True}},
        {"bench__vllm_python": "/x/python"})]
    assert prints[0] == prints[1] and len(set(prints)) == 3


# -- refusals ----------------------------------------------------------------------------------------------------------

def test_refused_before_any_work(tiny_base_dir: Path, heads: dict[str, str], tmp_path: Path) -> None:
    def check(*methods: str, about: dict[str, Any] | None = None, **changes: object) -> None:
        python = python_that_says(tmp_path, **(about or {}))
        check_vllm(config_for(tiny_base_dir, tmp_path, **{"bench__vllm_python": python, **changes}), methods, heads)

    check("plain", "vllm", "vllm+ngram", "vllm+hydra", "vllm+hydra@3")
    check("plain", "hydra++", bench__vllm_python="/no/such/python")  # none of them is vLLM's
    check("vllm", "vllm+ngram", about={"plugin": False})  # which need no plug-in
    wrong: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        (r"vllm\+hydra\+\+: kind=hydra\+\+: its prefix layer", ("vllm", "vllm+hydra++"), {}),
        (r"vllm\+hydra@4: 4 tokens are asked for, and there are 3 heads", ("vllm", "vllm+hydra@4"), {}),
        (r"does not read base\.dtype=int4", ("vllm",), {"base__dtype": "int4"}),
        (r"a drafter with 'eagle3' in its path", ("vllm", "vllm+hydra"), {"name": "my-eagle3"}),
        (r"bench\.methods: vllm: .*python has no vLLM: pip install 'hydra-heads\[vllm\]'", ("vllm",), {"about": {"vllm": False}}),
        (r"bench\.methods: vllm\+hydra: .*has no vLLM", ("vllm", "vllm+hydra"), {"about": {"vllm": False, "plugin": False}}),
        (r"vllm\+hydra: .* has vLLM and not this project", ("vllm", "vllm+hydra"), {"about": {"plugin": False}}),
        (r"bench\.vllm_python=/no/such/python: is no Python", ("vllm",), {"bench__vllm_python": "/no/such/python"}),
        (r"bench\.vllm_python=/bin/false: is no Python .*\(ends with 1\)", ("vllm",), {"bench__vllm_python": "/bin/false"})]
    for words, methods, changes in wrong:
        with pytest.raises(InputError, match=words) as caught:
            check(*methods, **changes)
        assert "\n" not in str(caught.value)


def test_the_stage_refuses_before_it_makes_a_folder(tiny_base_dir: Path, heads: dict[str, str], tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "x"}\n', encoding="utf-8")
    for about, method, words in (({"vllm": False}, "vllm+ngram", "has no vLLM"), ({}, "vllm+hydra++", "prefix layer")):
        with pytest.raises(InputError, match=words):
            run_bench(config_for(tiny_base_dir, tmp_path, bench__prompts=str(prompts), bench__methods=[method],
                                 bench__vllm_python=python_that_says(tmp_path, **about), bench__heads=heads["hydra++"]))
    assert not (tmp_path / "runs").exists()


def test_what_a_python_has(seen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_environment(None).vllm and find_environment(sys.executable).prefix == sys.prefix
    monkeypatch.delenv("PYTHONPATH")
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(InputError, match=r"bench\.methods: vllm: .* has no vLLM"):
            find_environment(None)


def test_cores_and_openmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "KMP_AFFINITY", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of a Ray worker
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2, 9})
    found: Any = SimpleNamespace(prefix=str(tmp_path))
    values = vllm_environment(found, 2, on_cpu=True)
    assert values["VLLM_CPU_OMP_THREADS_BIND"] == "2,5" and values["KMP_AFFINITY"].endswith("proclist=[2,5]")
    assert values["OMP_NUM_THREADS"] == "2" and values["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and "LD_PRELOAD" not in values
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    assert vllm_environment(found, 2, on_cpu=True)["LD_PRELOAD"] == str(tmp_path / "lib" / "libiomp5.so")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "7")
    assert vllm_environment(found, 2, on_cpu=True)["VLLM_CPU_OMP_THREADS_BIND"] == "7"  # whoever sets it knows why
    on_gpu = vllm_environment(found, 2, on_cpu=False)
    assert "KMP_AFFINITY" not in on_gpu and on_gpu["VLLM_LOGGING_LEVEL"] == "WARNING" and on_gpu["OMP_NUM_THREADS"] == "1"


# -- measured ----------------------------------------------------------------------------------------------------------

def test_rows_of_single_requests_in_turn(seen: Path, tiny_base_dir: Path, heads: dict[str, str], tmp_path: Path,
                                         tiny_base: Base) -> None:
    plan = plan_for(tiny_base_dir, tmp_path, heads, bench__rounds=2)
    measure(plan, QUESTIONS)
    rows = read_rows(Path(plan.rows_file))
    assert len(rows) == 2 * len(QUESTIONS) * len(METHODS)
    for row in rows:
        if row.method == "plain":
            continue
        prompt, wanted = QUESTIONS[int(row.question)].prompt_ids, list[int]()
        while not wanted or (len(wanted) < 12 and wanted[-1] not in tiny_base.stop_ids):
            wanted.append(following(wanted[-1] if wanted else prompt[-1]))
        assert list(row.token_ids) == wanted and row.prefill_seconds > 0 and row.decode_seconds > 0
        if row.method == "vllm":
            assert (row.steps, row.drafted, row.accepted_lengths) == (len(wanted) - 1, 0, (len(wanted) - 1,))
        else:
            assert sum(row.accepted_lengths) == row.steps < len(wanted) - 1 and row.drafted > row.accepted > 0
            assert row.accepted == sum(place * count for place, count in enumerate(row.accepted_lengths))
            assert row.steps + row.accepted >= len(wanted) - 1  # the last step may bring more than there is room for
    asked = [line for line in lines(seen) if "prompt" in line][3:]  # after the warm-up
    order = [(tuple(line["prompt"]), line["method"]) for line in asked]
    first = [order[place][1] for place in range(0, len(order), 3)]
    assert {line["running"] for line in asked} == {1} and set(first) == {"None", "ngram", "medusa"}  # nobody is always first
    assert [prompt for prompt, _ in order] == [q.prompt_ids for _ in range(2) for q in QUESTIONS for _ in range(3)]
    started = [line["settings"] for line in lines(seen) if "settings" in line]
    assert [one.get("speculative_config", {}).get("num_speculative_tokens") for one in started] == [None, 15, 3]
    assert all(one["dtype"] == "float32" and not one["enable_prefix_caching"] for one in started)
    assert Path(started[2]["speculative_config"]["model"]).parent == tmp_path / "bench" / "vllm"
    figures = summarise(rows, read_losslessness(Path(plan.losslessness_file)))
    assert figures["vllm"]["vs_vllm"]["speed"] == 1.0 and figures["vllm+ngram"]["identical"] == 1.0
    assert figures["plain"]["vs_vllm"]["questions"] == 3 and figures["vllm+hydra"]["tokens_per_step"] > 1.5
    assert "vs vllm" in method_table(figures, "", "fp32").columns
    assert paired_results("a", "b", (rows, rows)) == []  # they are shown, and no contender of the project's own is among them
    measure(plan, QUESTIONS)  # nothing is left to do: no vLLM starts
    assert len([line for line in lines(seen) if "settings" in line]) == 3


def test_further_settings_and_shorter_chains(seen: Path, tiny_base_dir: Path, heads: dict[str, str], tmp_path: Path) -> None:
    plan = plan_for(tiny_base_dir, tmp_path, heads, ("plain", "vllm", "vllm+hydra@2", "vllm+ngram@4"), ngram__max_match=4,
                    bench__vllm_settings={"enforce_eager": True, "max_num_seqs": 7})
    measure(plan, QUESTIONS[:1])
    plain, hydra, ngram = (line["settings"] for line in lines(seen) if "settings" in line)
    assert plain["enforce_eager"] and plain["max_num_seqs"] == 7
    assert hydra["speculative_config"]["num_speculative_tokens"] == 2
    assert ngram["speculative_config"] == {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4,
                                           "prompt_lookup_min": 2}


def test_answers_are_compared_with_those_of_vllm(seen: Path, tiny_base_dir: Path, heads: dict[str, str], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed ones, and those of the check in fp32, alone and in a batch; `vllm` itself is compared with plain, timed."""
    monkeypatch.setenv("STAND_IN_DIFFERS", "ngram")
    plan = plan_for(tiny_base_dir, tmp_path, heads, bench__identity_prompts=2, bench__identity_batch=2)
    measure(plan, QUESTIONS)
    found = [row for row in read_losslessness(Path(plan.losslessness_file)) if row.method != "plain"]
    timed = [(row.method, row.question, row.index) for row in found if row.rows == 0]
    assert {one for one in timed if one[0] == "vllm+ngram"} == {("vllm+ngram", str(number), 11) for number in range(3)}
    assert {method for method, _, _ in timed} == {"vllm", "vllm+ngram"}  # the stand-in's own tokens are not the tiny base's
    checked = {(row.method, row.question, row.rows): row.verdict for row in found if row.rows}
    assert checked == {(method, str(number), rows): verdict for method, verdict in (
        ("vllm+ngram", "different"), ("vllm+hydra", "identical")) for number in range(2) for rows in (1, 2)}
    figures = summarise(read_rows(Path(plan.rows_file)), read_losslessness(Path(plan.losslessness_file)))
    assert figures["vllm+hydra"]["fp32"] == {"answers": 4, "identical": 4, "near_tie": 0, "different": 0}
    assert figures["vllm+hydra"]["identical"] == 1.0 and figures["vllm+ngram"]["identical"] == 0.0
    assert figures["vllm"]["fp32"] is None


def test_several_in_flight(seen: Path, tiny_base_dir: Path, heads: dict[str, str], tmp_path: Path) -> None:
    plan = plan_for(tiny_base_dir, tmp_path, heads, bench__single=False, bench__concurrency=[1, 3], bench__batch_prompts=3,
                    bench__max_batch_size=2, bench__batch_limits=["equal"], bench__concurrency_requests=6)
    measure(plan, QUESTIONS)
    rows = read_concurrency(Path(plan.concurrency_file))
    assert [(row.level, row.method) for row in rows] == [
        *((1, method) for method in METHODS), *((3, method) for method in (*METHODS[1:], METHODS[0]))]
    for row in rows:
        if row.method.startswith("vllm"):
            assert row.tokens == 6 * 12 and len(row.answers) == 6 and row.first_token[0] > 0 and row.between is not None
            assert 1 <= row.row_steps / row.steps <= row.level and (row.row_steps == row.steps) == (row.level == 1)
            assert (row.row_steps == 6 * 11) == (row.method == "vllm")
    figures = summarise_concurrency(rows)
    assert figures["3"]["vllm+hydra"]["identical"] == 1.0 and figures["3"]["vllm"]["speed_vs_vllm"] == 1.0
    assert figures["3"]["vllm+ngram"]["tokens_per_step"] > 1.2 and figures["3"]["vllm"]["tokens_per_step"] == 1.0
    assert "vs vllm" in concurrency_table(figures).columns
    asked = [line for line in lines(seen) if "prompt" in line and line["method"] == "None"]
    assert max(line["running"] for line in asked) == 3
    assert {row.method: row.tokens for row in read_batches(Path(plan.batch_file))} == dict.fromkeys(METHODS, 36)


@pytest.mark.parametrize(("variable", "words"), [
    ("STAND_IN_DIES", r"vllm\+ngram: vLLM stopped \(killed by signal 9, what a library prints is no answer\): see /.*ngram\.log"),
    ("STAND_IN_REFUSES", r"vllm\+ngram: vLLM stopped \(ValueError: Model architectures \['Tiny'\] are not supported\)")])
def test_one_that_dies_is_one_line_and_the_rows_stay(seen: Path, tiny_base_dir: Path, heads: dict[str, str], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch, variable: str, words: str) -> None:
    monkeypatch.setenv(variable, "ngram")
    plan = plan_for(tiny_base_dir, tmp_path, heads)
    with pytest.raises(StoppedError, match=words) as caught:
        measure(plan, QUESTIONS)
    assert "\n" not in str(caught.value) and "leave it out of bench.methods" in str(caught.value)
    before = read_rows(Path(plan.rows_file))
    assert {row.question for row in before} == ({"0", "1"} if variable == "STAND_IN_DIES" else set())
    monkeypatch.delenv(variable)
    measure(plan, QUESTIONS)
    rows = read_rows(Path(plan.rows_file))
    assert rows[:len(before)] == before and len(rows) == len(QUESTIONS) * len(METHODS)


def test_no_process_is_left(seen: Path, tiny_base_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    with VllmPool(plan_for(tiny_base_dir, tmp_path, {}), QUESTIONS) as pool:
        process = pool.process("vllm", tiny_base)
        assert pool.process("vllm", tiny_base) is process and process.version == "0.32.0"
        os.kill(process.process.pid, 0)
    assert process.process.returncode == 0  # by itself, when nothing more can be asked
    with VllmPool(plan_for(tiny_base_dir, tmp_path, {}), QUESTIONS) as pool:
        process = pool.process("vllm", tiny_base)
        os.kill(process.process.pid, signal.SIGSTOP)
        os.kill(process.process.pid, signal.SIGKILL)
    assert process.process.returncode == -signal.SIGKILL


def test_figures_of_a_single_answer_by_hand() -> None:
    """Three steps after the first token: 2, 0 and 1 drafts accepted, of which the last found no room."""
    found = outcome_of({"tokens": [[5, 6, 7, 8, 9, 10]], "sent": [0.5], "seconds": 9.0, "drafted": 9, "accepted": [2, 1, 0],
                        "events": [[1.5, [[0, 1]]], [2.0, [[0, 3]]], [3.0, [[0, 1]]], [3.5, [[0, 1]]]]})
    assert (found.steps, found.drafted, found.accepted, found.accepted_lengths) == (3, 9, 3, (1, 1, 1))
    assert (found.prefill_seconds, found.decode_seconds) == (1.0, 2.0)


@pytest.mark.slow
def test_the_stage_reports_and_promotes_none_of_them(local_ray: None, tiny_base_dir: Path, heads: dict[str, str],
                                                     tmp_path: Path) -> None:
    """With the stand-in, in a Ray worker: they are the fastest there, and stand in the report, its figures and the comparison."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={STAND_IN}:{ROOT} exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("x", "yes", "zero")), encoding="utf-8")
    config = config_for(tiny_base_dir, tmp_path, bench__prompts=str(prompts), bench__heads=heads["hydra"], bench__champion=False,
                        bench__methods=["vllm+ngram", "vllm+hydra@2"], bench__vllm_python=str(python),
                        bench__identity_prompts=2, bench__concurrency=[2], bench__concurrency_requests=4)
    result = run_bench(config)
    methods = result.figures["methods"]
    assert list(methods) == ["plain", "vllm", "vllm+ngram", "vllm+hydra@2"]
    assert methods["vllm+hydra@2"]["fp32"]["identical"] == 4 and methods["vllm+hydra@2"]["vs_vllm"]["questions"] == 3
    told = Path(result.outputs["report"]).with_name("report.md").read_text(encoding="utf-8")
    assert told.count("| vs vllm |") == 2 and told.count("| vllm+hydra@2 |") == 3  # alone, its steps, two in flight
    assert (tmp_path / "runs" / "default" / "bench" / "vllm" / "hydra-float32" / "model.safetensors").is_file()
    tracker = Tracker.open(config)
    assert MlflowClient(tracker.uri).get_run(tracker.parent()).data.tags["fastest"] == "plain"  # of this project's
    assert run_promote(config).figures["champion"] == "plain"
    assert run_bench(config).skipped


# -- vLLM itself -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.drawn
@pytest.mark.timeout(1500)
def test_vllm_itself(vllm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and two at once, in fp32: the naive loop's tokens but for near-ties, and heads whose drafts are accepted."""
    from hydra_core.base import load_base

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    base_dir = save_tiny(tmp_path / "base", **WIDE)
    base = load_base(str(base_dir), dtype="fp32", cache=tmp_path)
    drafter = overfit_heads(base, "hydra", [question.prompt_ids for question in QUESTIONS])
    save_checkpoint(tmp_path / "hydra", drafter, base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    plan = plan_for(base_dir, tmp_path, {"hydra": str(tmp_path / "hydra")}, bench__vllm_python=vllm_python,
                    bench__concurrency=[2], bench__concurrency_requests=4, bench__max_new_tokens=30,
                    bench__vllm_settings={"enforce_eager": True})
    measure(plan, QUESTIONS)
    rows = read_rows(Path(plan.rows_file))
    for row in rows:
        question = QUESTIONS[int(row.question)]
        wanted = naive_generate(base, Request("r", question.prompt_ids, 30)).token_ids
        assert compare(base, question.prompt_ids, wanted, row.token_ids).verdict in ("identical", "near-tie"), row
    figures = summarise(rows, read_losslessness(Path(plan.losslessness_file)))
    assert figures["vllm+hydra"]["tokens_per_step"] > 2 and figures["vllm+hydra"]["accepted_at_least"][0] > 0.5
    assert figures["vllm"]["tokens_per_step"] == 1.0 and figures["vllm"]["first_token_ms"] > 0
    load = summarise_concurrency(read_concurrency(Path(plan.concurrency_file)))["2"]
    assert load["vllm+hydra"]["tokens_per_step"] > 2 and load["vllm"]["rows_running"] > 1
    assert re.search(r"\w", (tmp_path / "bench" / "vllm" / "vllm.log").read_text(encoding="utf-8"))
