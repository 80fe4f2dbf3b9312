"""The flow of answers: what is left to do, what is found to be done, an actor that is killed, and a driver that holds no rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hydra_core.base import Base, BaseIdentity, resolve_base
from hydra_core.decoding.states import RecordedStates
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.interop import VllmSettings
from hydra_core.tree import DraftTree, TreeSet
from pipelines.config import RunConfig, load_config
from pipelines.distill import answers
from pipelines.distill.answers import answer_prompts, most_workers
from pipelines.distill.file_prompts import PART_ROWS
from pipelines.distill.stage import answered, distill_fingerprint, distilled, run_distill
from pipelines.distill.tasks import ANSWERED, TO_ANSWER, PartWriter, TaskReader, parts_to_read, rows_of
from pipelines.rows.parquet_parts import part_files, read_parts, write_part
from pipelines.rows.row_ids import merged, row_digests
from pipelines.rows.schemas import FEATURES, PROMPTS, RESPONSES, content_id, is_in_share
from pipelines.runtime.artifacts import RunPaths, read_manifest
from pipelines.runtime.row_flow import Rows
from tests.pipelines.distill.stand_ins import IdleAnswerer, KilledAnswerer
from tests.pipelines.distill.test_stage import config_for, in_this_process, write_prompts
from tests.trained import random_heads

GROWTH = 48 << 20
"""Bytes that the driver may grow by from a thousand rows to two hundred thousand."""


def prompt(number: int, split: str = "train") -> dict[str, Any]:
    return {"prompt_id": content_id("p", number), "messages": None, "prompt": f"p {number}", "prompt_ids": [5, 6 + number % 9],
            "source": "t", "split": split}


def answer(name: str, split: str = "train") -> dict[str, Any]:
    return {"id": name, "prompt_id": name, "prompt_ids": [1], "response_ids": [2, 3], "finish_reason": "stop",
            "temperature": 0.0, "seed": 0, "source": "t", "split": split, "base": "b"}


def reader(**changes: Any) -> TaskReader:
    given = {"base": "b@1:fp32", "limits": [20, None], "temperatures": (0.0, 0.7), "seed": 11, "block_rows": 4, "feature_rows": 3,
             "responses": merged(), "features": merged(), "held_out_only": False}
    return TaskReader(**(given | changes))


def read(of: TaskReader, kind: str, folder: Path) -> list[Rows]:
    return [rows for table in parts_to_read(kind, part_files(folder)) for rows in of(table)]


def test_what_is_not_answered_is_handed_on_in_blocks(tmp_path: Path) -> None:
    """With the ids that earlier versions gave; a part that is read twice gives the same blocks."""
    write_part(tmp_path, [prompt(number) for number in range(7)], PROMPTS, key="prompt_id")
    wanted = {}
    for number in range(7):
        for sample, temperature in enumerate((0.0, 0.7)):
            name = content_id("p", number)
            seed = 11 + int(content_id(name, sample)[:8], 16)
            wanted[content_id(name, temperature, seed, sample, "b@1:fp32", [20, None])] = (name, seed, pytest.approx(temperature))
    blocks = read(reader(), TO_ANSWER, tmp_path)
    rows = [row for block in blocks for row in block.table.to_pylist()]
    assert [len(block.table) for block in blocks] == [4, 4, 4, 2] and {block.name for block in blocks} == {TO_ANSWER}
    assert {row["id"]: (row["prompt_id"], row["seed"], row["temperature"]) for row in rows} == wanted
    assert {row["base"] for row in rows} == {"b@1:fp32"} and not any(row["has_features"] for row in rows)
    done, lost = list(wanted)[:9], list(wanted)[9:11]
    rest = reader(responses=merged(row_digests(done)), features=merged(row_digests([*done[:5], *lost])))
    once, again = (read(rest, TO_ANSWER, tmp_path) for _ in range(2))
    assert [block.table.to_pylist() for block in once] == [block.table.to_pylist() for block in again]
    left = {row["id"]: row["has_features"] for block in once for row in block.table.to_pylist()}
    assert left == {name: name in lost for name in wanted if name not in done}


def test_answers_without_hidden_states_are_handed_on(tmp_path: Path) -> None:
    names = "abcdefgh"
    for part in ("abcde", "fgh"):
        write_part(tmp_path, [answer(name, "held_out" if name in "bcg" else "train") for name in part], RESPONSES)
    blocks = read(reader(features=merged(row_digests("ah"))), ANSWERED, tmp_path)
    assert sorted(row["id"] for block in blocks for row in block.table.to_pylist()) == sorted(set(names) - set("ah"))
    assert max(len(block.table) for block in blocks) == 3 and {block.name for block in blocks} == {ANSWERED}
    blocks = read(reader(features=merged(row_digests("b")), held_out_only=True), ANSWERED, tmp_path)
    assert sorted(row["id"] for block in blocks for row in block.table.to_pylist()) == ["c", "g"]


def small_run(storage: Path, base: Path, prompts: int) -> tuple[RunConfig, Path]:
    """Settings, and a folder with prompts, of which every third is held out."""
    config = load_config(None, {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "distill.features":
                                "held_out", "distill.temperatures": [0.0], "distill.max_batch_size": 2})
    folder = RunPaths.of(config).stage("distill")
    write_part(folder / "prompts", [prompt(number, "train" if number % 3 else "held_out") for number in range(prompts)], PROMPTS,
               key="prompt_id")
    return config, folder


def test_an_answer_in_two_parts_is_counted_once(tiny_base_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no run of `distill` would ever end: its answers would be more than its prompts."""
    config, folder = small_run(storage, tiny_base_dir, 3)
    for part in ("ab", "bc"):
        write_part(folder / "responses", [answer(name) for name in part], RESPONSES)
    monkeypatch.setattr(answers, "run_flow", lambda *_, **__: pytest.fail("nothing is left to do"))
    figures = answer_prompts(config, folder)
    assert (figures["responses"], figures["response_tokens"], figures["errors"], figures["resumed"]) == (3, 6, 0, 3)


@pytest.mark.parametrize("heads", [None, "hydra"])
def test_hidden_states_are_those_of_the_decoding_and_a_share_is_checked(
        tiny_base_dir: Path, tiny_base: Base, storage: Path, monkeypatch: pytest.MonkeyPatch, heads: str | None) -> None:
    """No other forward is run but for the rows of the share, which their ids decide; states that are off by one are refused."""
    monkeypatch.setattr(answers, "run_flow", in_this_process)
    again, forward = list[tuple[int, ...]](), Base.hidden_states
    monkeypatch.setattr(Base, "hidden_states", lambda base, rows: again.extend(map(tuple, rows)) or forward(base, rows))
    if heads is not None:
        folder = storage.parent / "heads"
        trees = TreeSet({1: DraftTree(((0,), (1,), (0, 0)))})
        save_checkpoint(folder, random_heads(tiny_base, heads), tiny_base.identity, trees, {})
    changes = {} if heads is None else {"heads": str(folder)}
    for share in (0.0, 0.4, 1.0):
        config, folder = small_run(storage / f"{share}", tiny_base_dir, 12)
        distill = config.distill.model_copy(update={"check_share": share, "features": "all", "max_new_tokens": 9, **changes,
                                                    "temperatures": (0.0, 1.0), "feature_dtype": "fp32"})
        config = config.model_copy(update={"distill": distill})
        again.clear()
        figures = answer_prompts(config, folder)
        rows = read_parts(folder / "features", FEATURES).to_pylist()
        checked = [(*row["prompt_ids"], *row["response_ids"]) for row in rows if is_in_share(row["id"], share)]
        assert sorted(again) == sorted(checked) and (share == 0.4) == (0 < len(checked) < 24) and len(rows) == 24
        assert figures["greedy_reproduced"] == (None if share == 0 else 1)
        for row in rows:
            hidden = np.frombuffer(row["hidden"], "<f4").reshape(row["hidden_tokens"], row["hidden_width"])
            exact = forward(tiny_base, [row["prompt_ids"] + row["response_ids"]])[0].numpy()
            np.testing.assert_allclose(hidden, exact, atol=1e-4, rtol=1e-4)
    shutil.rmtree(folder / "responses")
    shutil.rmtree(folder / "features")
    first = RecordedStates.first
    again.clear()
    monkeypatch.setattr(RecordedStates, "first", lambda states, count: first(states, count).roll(1, 0))
    with pytest.raises(RuntimeError, match=r"only 0\.0\d+ of the hidden states that decoding recorded"):
        answer_prompts(config, folder)
    assert len(again) == 24 == answer_prompts(config, folder)["feature_rows"]
    assert len(again) == 48  # none of those was taken for done: a forward computes them


def losing(times: int, name: str) -> Callable[..., Counter[str]]:
    """A flow that loses the last table of this name, so many times."""
    left = [times]

    def flow(source: Any, read: Any, actor: Any, settings: Any, write: PartWriter, **_: Any) -> Counter[str]:
        kept: list[Rows] = []
        counts = in_this_process(source, read, actor, settings, kept.append)
        lost = [rows for rows in kept if rows.name == name][-1:] if left[0] else []
        left[0] -= 1
        for rows in kept:
            if rows not in lost:
                write(rows)
        return counts

    return flow


@pytest.mark.parametrize("name", ["responses", "features"])
def test_rows_that_are_lost_are_computed_again(tiny_base_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch,
                                               capfd: pytest.CaptureFixture[str], name: str) -> None:
    """Some of them twice then, which stand once; in the end they are an error."""
    monkeypatch.setattr(answers, "Answerer", IdleAnswerer)
    monkeypatch.setattr(answers, "run_flow", losing(2, name))
    config, folder = small_run(storage, tiny_base_dir, 40)
    figures = answer_prompts(config, folder)
    assert (figures["responses"], figures["response_tokens"], figures["feature_rows"]) == (40, 40, 14)
    assert len(read_parts(folder / "responses", RESPONSES, ["id"])) == 40
    found = read_parts(folder / "features", FEATURES, ["id", "split"])
    assert len(found) == 14 and set(found["split"].to_pylist()) == {"held_out"}
    assert capfd.readouterr().err.count("were lost with a worker: they are computed again") == 2
    monkeypatch.setattr(answers, "run_flow", losing(3, name))
    config, folder = small_run(storage.parent / "other", tiny_base_dir, 40)
    with pytest.raises(RuntimeError, match="is not 40 rows" if name == "responses" else "rows have hidden states, but 14"):
        answer_prompts(config, folder)


def test_the_largest_number_of_workers(tiny_base_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the pool, no larger than there are blocks, and changes no row."""
    pools = []
    monkeypatch.setattr(answers, "Answerer", IdleAnswerer)
    monkeypatch.setattr(answers, "run_flow", lambda *given, pool, **_: pools.append(pool) or in_this_process(*given))
    config, folder = small_run(storage, tiny_base_dir, 40)
    many = config.model_copy(update={"distill": config.distill.model_copy(update={"max_workers": 7})})
    assert distill_fingerprint(many) == distill_fingerprint(config) and most_workers(many.distill) == 7
    answer_prompts(many, folder)
    assert [(pool.least, pool.most) for pool in pools] == [(1, 7)]
    with pytest.raises(InputError, match=r"distill\.max_workers=1 is fewer than distill\.workers\.count=2"):
        load_config(None, {"distill.workers.count": 2, "distill.max_workers": 1})


def test_vllm_answers_in_a_flow_of_its_own(tiny_base_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then actors without it compute hidden states, of rows that stood before too; error rows stay, and are tried again."""
    settings, flows = VllmSettings(), list[tuple[set[str], Any, Any]]()

    class Picky(IdleAnswerer):
        """Refuses the answers to one prompt, and gives no hidden states where vLLM answers."""

        def __call__(self, given: Rows) -> Iterator[Rows]:
            rows, = [found for found in super().__call__(given) if found.name == ("features" if given.name == ANSWERED else
                                                                                  "responses")]
            bad = [{"id": row["id"], "stage": "distill", "message": "no"} for row in rows.table.to_pylist()
                   if row["prompt_id"] == content_id("p", 1)]
            yield rows if given.name == ANSWERED or not bad else rows_of("errors/answers", bad)

    def flow(source: Any, read: Any, actor: Any, settings: Any, *given: Any, **_: Any) -> Counter[str]:
        flows.append(({kind for table in source for kind in table["kind"].to_pylist()}, settings.vllm, settings.heads))
        return in_this_process(source, read, actor, settings, *given)

    monkeypatch.setattr(answers, "Answerer", Picky)
    monkeypatch.setattr(answers, "run_flow", flow)
    monkeypatch.setattr(answers, "vllm_settings", lambda *_: settings)
    config, folder = small_run(storage, tiny_base_dir, 4)
    distill = config.distill.model_copy(update={"heads": "H", "max_error_share": 0.5, "max_batch_size": 1})
    config = config.model_copy(update={"engine": "vllm", "distill": distill})
    monkeypatch.setattr(answers, "BLOCK_BATCHES", 1)
    figures = answer_prompts(config, folder)
    assert (figures["responses"], figures["errors"], figures["feature_rows"]) == (3, 1, 2)
    assert flows == [({TO_ANSWER}, settings, "H"), ({ANSWERED}, None, None)]
    ids = set(read_parts(folder / "responses", RESPONSES, ["id"])["id"].to_pylist())
    digest = str(resolve_base(str(tiny_base_dir), storage / "cache").digest)
    base = str(BaseIdentity(tiny_base_dir.name, digest, "fp32"))
    seeds = {number: int(content_id(content_id("p", number), 0)[:8], 16) for number in (0, 2, 3)}
    assert ids == {content_id(content_id("p", number), 0.0, seed, 0, base, [config.distill.max_new_tokens, None, "vllm"])
                   for number, seed in seeds.items()}
    shutil.rmtree(folder / "features")
    assert answer_prompts(config, folder)["feature_rows"] == 2 and flows[2:] == flows[:2]


@pytest.mark.slow
def test_a_killed_actor_changes_no_row(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed among its answers, and again among its hidden states, though they come in another order each time. The rows are
    those of an undisturbed run, without a second flow for what was lost."""
    prompts = write_prompts(storage.parent / "p.jsonl", 20)
    wanted: dict[str, Any] = {"distill__rows_per_file": 4, "distill__max_batch_size": 3, "distill__max_new_tokens": 6}
    calm = config_for(storage.parent / "calm", tiny_base_dir, prompts, **wanted)
    with monkeypatch.context() as patch:
        patch.setattr(answers, "run_flow", in_this_process)
        run_distill(calm)
    monkeypatch.setattr(answers, "Answerer", KilledAnswerer)
    monkeypatch.setattr(answers, "ATTEMPTS", 1)
    config = config_for(storage, tiny_base_dir, prompts, **wanted)
    figures = run_distill(config).figures
    assert {path.name for path in (storage / "cache").glob("killed-*")} == {"killed-responses", "killed-features"}
    assert figures["responses"] == figures["feature_rows"] == 40
    for contract, part in ((RESPONSES, "responses"), (FEATURES, "features")):
        found, undisturbed = (read_parts(RunPaths.of(one).stage("distill") / part, contract, RESPONSES.names).to_pylist()
                              for one in (config, calm))
        assert sorted(found, key=lambda row: row["id"]) == sorted(undisturbed, key=lambda row: row["id"]) and len(found) == 40
    for row in read_parts(RunPaths.of(config).stage("distill") / "features", FEATURES).to_pylist()[::9]:
        hidden = np.frombuffer(row["hidden"], "<f4").reshape(row["hidden_tokens"], row["hidden_width"])
        exact = tiny_base.hidden_states([row["prompt_ids"] + row["response_ids"]])[0].numpy()
        np.testing.assert_allclose(hidden, exact, atol=1e-4, rtol=1e-4)
    for folder, digest in (distilled(config), answered(config)):
        manifest = read_manifest(RunPaths.of(config).stage("distill"))
        contract = FEATURES if folder.name == "features" else RESPONSES
        ids = sorted(read_parts(folder, contract, ["id"])["id"].to_pylist())
        assert manifest is not None and digest == content_id(manifest["fingerprint"], ids)  # as earlier versions had it


DRIVER = """
import json, sys, threading, time
from pathlib import Path
import psutil, ray
from pipelines.config import load_config
from pipelines.distill import answers, prompts
from tests.pipelines.distill.stand_ins import IdleAnswerer, IdleTemplater

answers.Answerer, prompts.Templater = IdleAnswerer, IdleTemplater
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning")
peak, running = 0, True

def watch():
    global peak
    while running:
        memory = psutil.Process().memory_info()
        peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.05)

threading.Thread(target=watch, daemon=True).start()
for name in ("warm", "small", "large"):
    peak = 0
    config = load_config(None, json.loads(sys.argv[1]) | {"name": name})
    figures = answers.answer_prompts(config, Path(sys.argv[2]) / "runs" / name / "distill")
    print(json.dumps({"name": name, "peak": peak, **figures}), flush=True)
for name in ("small", "large"):
    peak = 0
    file = {"name": f"file-{name}", "prompts.source": "jsonl", "prompts.path": str(Path(sys.argv[2]) / f"{name}.jsonl")}
    config, folder = load_config(None, json.loads(sys.argv[1]) | file), Path(sys.argv[2]) / "runs" / f"file-{name}" / "distill"
    prompts.check_prompts(config, folder)
    prompts.read_prompts(config, folder)
    print(json.dumps({"name": f"file-{name}", "peak": peak, **prompts.written_prompts(folder)}), flush=True)
running = False
"""


@pytest.mark.slow
def test_the_driver_holds_no_data_set(tiny_base_dir: Path, storage: Path, worker_env: dict[str, str],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is flat from a thousand to two hundred thousand rows, half of which stand already, and of a file."""
    rows = {"warm": 1_000, "small": 1_000, "large": 200_000}
    settings = {"storage": str(storage), "base.model": str(tiny_base_dir), "base.dtype": "fp32", "distill.features": "held_out",
                "distill.temperatures": [0.0], "distill.max_batch_size": 256, "distill.workers.cpus": 0.5}
    monkeypatch.setattr(answers, "Answerer", IdleAnswerer)
    monkeypatch.setattr(answers, "run_flow", in_this_process)
    for name, count in rows.items():
        folder = storage / "runs" / name / "distill"
        for numbers in (range(count // 2), range(count // 2, count)):
            for start in range(0, len(numbers), PART_ROWS):
                made = [prompt(at, "train" if at % 10 else "held_out") for at in numbers[start:start + PART_ROWS]]
                write_part(folder / "prompts", made, PROMPTS, key="prompt_id")
            if not numbers.start:
                answer_prompts(load_config(None, settings | {"name": name}), folder)
        with (storage / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(f'{{"prompt": "p {number}"}}\n' for number in range(count))
            file.write('{"x": 1}\n{"prompt": "p 0"}\n')
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | worker_env
    process = subprocess.run([sys.executable, "-c", DRIVER, json.dumps(settings), str(storage)], env=environment, check=True,
                             stdout=subprocess.PIPE)
    found = {line["name"]: line for line in map(json.loads, process.stdout.splitlines())}
    for name, count in rows.items():
        assert (found[name]["responses"], found[name]["resumed"]) == (count, count // 2)
        stored = read_parts(storage / "runs" / name / "distill" / "responses", RESPONSES, ["id"])["id"].to_pylist()
        assert len(stored) == len(set(stored)) == count
        assert found[name]["feature_rows"] == count // 10
        if name != "warm":
            read = found[f"file-{name}"]
            assert (read["prompts"], read["prompt_errors"], read["prompts_skipped"]) == (count, 1, 1)
            ids = read_parts(storage / "runs" / f"file-{name}" / "distill" / "prompts", PROMPTS, ["prompt_id"])["prompt_id"]
            assert len(ids) == len(set(ids.to_pylist())) == count
    for kind in ("", "file-"):
        grown = found[f"{kind}large"]["peak"] - found[f"{kind}small"]["peak"]
        print(f"the driver grew by {grown / 2**20:.1f} MiB over {found[f'{kind}small']['peak'] / 2**20:.1f} MiB")
        assert grown < GROWTH, {name: line["peak"] >> 20 for name, line in found.items()}
