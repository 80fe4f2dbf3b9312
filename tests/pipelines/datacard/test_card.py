"""A data card from rows that are known: counts by hand, coverage and acceptance against other ways to compute them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from hydra_core.tree.search import reference_tokens_per_step
from hydra_core.tree.simulation import MISS, RankRows
from pipelines.config import RunConfig, load_config
from pipelines.datacard import gather as gathering
from pipelines.datacard.acceptance import held_out_ranks, tokens_per_step_by_group
from pipelines.datacard.counts import Group, most_frequent, quantiles, source_name, task_of
from pipelines.datacard.gather import gather
from pipelines.datacard.languages import languages_of, text_of
from pipelines.datacard.report import markdown
from pipelines.datacard.stage import run_datacard
from pipelines.distill.file_prompts import prompt_id_of
from pipelines.rows.parquet_parts import write_part
from pipelines.rows.prompt_reader import PromptRow, read_prompt_rows
from pipelines.rows.schemas import ERRORS, PROMPTS, RESPONSES
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, stage_folder
from pipelines.tracking import Tracker
from tests.pipelines.synthetic import feature_row, write_shard
from tests.trained import random_heads

FILE = [{"prompt": "Was ist ein Entwurfsbaum? Erkläre es bitte.", "source": "wiki", "task": "qa"},
        {"prompt": "Translate this sentence to German, please.", "source": "wiki", "category": "translation"},
        {"prompt": "Name three rivers that flow into the sea.", "source": "web"},
        {"prompt": "1 + 1?", "source": "web", "task": "maths"}]


def config_for(storage: Path, base: Path, **changes: object) -> RunConfig:
    return load_config(None, {"storage": str(storage), "name": "d", "base.model": str(base), "base.dtype": "fp32",
                              "prompts.source": "jsonl", "prompts.path": str(storage.parent / "p.jsonl"),
                              "train.drafters": {"small": {"kind": "hydra", "num_heads": 3, "draft_vocab_size": 8}}, **changes})


def write_rows(config: RunConfig, base: Base) -> Path:
    """A finished `distill` of the four prompts of FILE; returns its folder. The first two are held out."""
    path = Path(str(config.prompts.path))
    path.write_text("".join(json.dumps(row) + "\n" for row in FILE), encoding="utf-8")
    folder = RunPaths.of(config).stage("distill")
    ids = [prompt_id_of(row) for row in read_prompt_rows(path) if isinstance(row, PromptRow)]
    rows = [feature_row(base, number, "held_out" if number < 2 else "train") | {"prompt_id": one}
            for number, one in enumerate(ids)]
    prompts = [{"prompt_id": one, "messages": None, "prompt": given["prompt"], "prompt_ids": row["prompt_ids"],
                "source": given["source"], "split": row["split"]} for one, given, row in zip(ids, FILE, rows, strict=True)]
    with stage_folder(config, "distill", folder, fingerprint("distill", {}, {})) as stage:
        write_part(folder / "prompts", prompts, PROMPTS, key="prompt_id")
        write_part(folder / "responses", [{name: row[name] for name in RESPONSES.names} for row in rows], RESPONSES)
        write_part(folder / "errors" / "prompts", [
            {"id": f"p:{number}", "stage": "distill", "message": f"row {number}: has no text"} for number in (7, 8)], ERRORS)
        write_shard(folder / "features" / "part-0.parquet", rows)
        files = [one for one in folder.rglob("*.parquet")]
        stage.finish(StageResult("distill", None, {}, {"prompts_skipped": 3, "prompt_errors": 2, "errors": 0}), files)
    return folder


def answers_of(folder: Path) -> list[dict[str, Any]]:
    from pipelines.rows.parquet_parts import read_parts

    return list(read_parts(folder / "responses", RESPONSES).to_pylist())


def test_counts_by_hand(tiny_base: Base, tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir)
    folder = write_rows(config, tiny_base)
    rows = gather(config, folder, tiny_base.vocab_size, tuple(tiny_base.stop_ids))
    answers = answers_of(folder)
    assert rows.split_rows == {"held_out": 2, "train": 2} and rows.finish == {"length": 4}
    sources = {name: (group.prompts, group.held_out) for name, group in rows.groups["sources"].items()}
    assert sources == {"wiki": (2, 2), "web": (2, 0)}
    assert {name: group.prompts for name, group in rows.groups["tasks"].items()} == {
        "qa": 1, "translation": 1, "none given": 1, "maths": 1}
    assert sum(group.tokens for group in rows.groups["tasks"].values()) == sum(len(one["response_ids"]) for one in answers)
    assert rows.answer_lengths["count"] == 4 and rows.answer_lengths["max"] == max(len(one["response_ids"]) for one in answers)
    assert rows.errors == [("row 7: has no text", 2)]
    counts = np.zeros(tiny_base.vocab_size, np.int64)
    for one in answers:
        if one["split"] == "train":
            np.add.at(counts, one["response_ids"], 1)
    drafted = set(DraftVocab.rank(torch.from_numpy(counts), 8, tiny_base.stop_ids).ids.tolist())
    wiki = [token for one in answers if one["split"] == "held_out" for token in one["response_ids"]]
    assert rows.groups["sources"]["wiki"].covered == {8: sum(token in drafted for token in wiki)}
    assert 0 < rows.coverage[8] <= 1


def test_what_is_not_known_is_told(tiny_base: Base, tiny_base_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(storage, tiny_base_dir)
    folder = write_rows(config, tiny_base)
    monkeypatch.setattr(gathering, "can_detect", lambda: False)
    Path(str(config.prompts.path)).unlink()
    rows = gather(config, folder, tiny_base.vocab_size, tuple(tiny_base.stop_ids))
    assert set(rows.groups["tasks"]) == {"none given"} and rows.languages == {}
    assert any(note.startswith("tasks: not known, as the file of prompts cannot be read any more") for note in rows.notes)
    assert any("pip install 'hydra-heads[datacard]'" in note for note in rows.notes)
    itself = config_for(storage, tiny_base_dir, **{"prompts.source": "self", "prompts.path": None,
                                                   "datacard.language_prompts": 0})
    told = gather(itself, folder, tiny_base.vocab_size, ()).notes
    assert told == ["tasks: not known, as rows of prompts.source=self name none"]


@pytest.mark.skipif(importlib.util.find_spec("py3langid") is None, reason="the extra `datacard` is not installed")
def test_languages() -> None:
    found = languages_of(["Was ist ein Entwurfsbaum? Erkläre es bitte.", "Name three rivers that flow into the sea.",
                          "Name three lakes that lie in the mountains.", "1 + 1 = ?"])
    assert found == {"en": 2, "de": 1, "too short to tell": 1}


def test_texts_and_names() -> None:
    chat = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "first"},
                       {"role": "assistant", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "last"}]}])
    assert (text_of(None, chat), text_of("raw", None), text_of(None, json.dumps([]))) == ("last", "raw", "")
    assert (source_name("self/17"), source_name("gsm8k"), source_name("")) == ("self-made", "gsm8k", "none given")
    assert task_of({"category": "qa", "task": None}, ("task", "category")) == "qa"
    assert task_of({"category": "qa", "task": 3}, ("task", "category")) == "3" and task_of({}, ("task",)) == "none given"
    assert most_frequent(["row 1: bad", "row 22: bad", "row 3: bad", "other"]) == [
        ("row 1: bad", 2), ("row 22: bad", 1), ("other", 1)]
    assert quantiles([]) == {} and quantiles([1, 2, 3, 4, 5])["p50"] == 3 and quantiles([1, 2, 3, 4, 5])["mean"] == 3.0
    assert Group().figures()["coverage"] == {}


def test_acceptance_of_groups_by_hand() -> None:
    """Two rows of four positions with one head: in the first every draft is right, in the second none."""
    ranks = RankRows(torch.tensor([[0], [0], [0], [0], [MISS], [MISS], [MISS], [MISS]]), (4, 4))
    assert tokens_per_step_by_group(ranks, ["easy", "hard"]) == {"easy": 2.0, "hard": 1.0}
    assert tokens_per_step_by_group(ranks, ["all", "all"]) == {"all": pytest.approx(reference_tokens_per_step(ranks))}


def with_heads(config: RunConfig, base: Base) -> Path:
    """Heads of the drafter `small`, as `train` leaves them."""
    folder = RunPaths.of(config).stage("train", "small")
    with stage_folder(config, "train", folder, "f") as stage:
        save_checkpoint(folder / "heads", random_heads(base, "hydra"), base.identity, TreeSet({1: DraftTree(((0,),))}), {})
        stage.finish(StageResult("train", None, {"heads": str(folder / "heads")}, {}), [*(folder / "heads").iterdir()])
    return folder / "heads"


def test_acceptance_of_heads(tiny_base: Base, tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir)
    features = write_rows(config, tiny_base) / "features"
    ids, found = held_out_ranks(config.model_dump(mode="json", by_alias=True), {"small": str(with_heads(config, tiny_base))},
                                str(features))
    lengths = {one["id"]: len(one["response_ids"]) for one in answers_of(features.parent) if one["split"] == "held_out"}
    assert set(ids) == set(lengths) and found["small"].positions == tuple(lengths[one] - 1 for one in ids)  # in their order
    assert sum(found["small"].positions) == len(found["small"].ranks)


@pytest.mark.slow
def test_the_stage(tiny_base: Base, tiny_base_dir: Path, storage: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_for(storage, tiny_base_dir)
    with pytest.raises(InputError, match="no finished `distill` here"):
        run_datacard(config)
    write_rows(config, tiny_base)
    first = run_datacard(config)
    assert (first.figures["prompts"], first.figures["prompts_skipped"], first.figures["prompt_errors"]) == (4, 3, 2)
    assert run_datacard(config).skipped
    without = json.loads((RunPaths.of(config).stage("datacard") / "datacard.json").read_text())
    assert without["drafters"] == [] and "acceptance: not measured, as there are no trained heads" in without["notes"]
    with_heads(config, tiny_base)
    second = run_datacard(config)
    assert not second.skipped, "there are heads now"
    card = json.loads((RunPaths.of(config).stage("datacard") / "datacard.json").read_text())
    assert card["drafters"] == ["small"] and card["acceptance_rows"] == 2 and card["sources"]["wiki"]["acceptance_rows"] == 2
    assert 1 <= card["sources"]["wiki"]["tokens_per_step"]["small"] <= 4 and card["sources"]["web"]["tokens_per_step"] == {}
    page = (RunPaths.of(config).stage("datacard") / "datacard.md").read_text()
    assert "## Sources" in page and "| translation | 1 |" in page and page == markdown(card, 24)
    assert "all others (3)" in markdown(card, 1)
    metrics = MlflowClient(Tracker.open(config).uri).get_run(str(second.run_id)).data.metrics
    assert metrics["prompts"] == 4 and metrics["sources.wiki.small.tokens_per_step"] == pytest.approx(
        card["sources"]["wiki"]["tokens_per_step"]["small"], abs=1e-4)
    with pytest.raises(InputError, match="rows were made by base"):
        run_datacard(config_for(storage, tiny_base_dir, **{"base.dtype": "bf16"}))
