"""Rows out of what an endpoint has recorded: of this base alone, each once, without what is to be left out, with features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_core.base import Base
from hydra_core.decoding import naive_generate
from hydra_core.errors import InputError
from hydra_core.sampling import Request
from pipelines.config import RunConfig, load_config
from pipelines.distill import answers
from pipelines.distill.answers import answer_prompts
from pipelines.distill.prompts import COUNTS
from pipelines.distill.served import SKIPPED, check_served, read_served
from pipelines.distill.stage import _deciding_settings, distill_fingerprint
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.parquet_parts import part_files, read_parts
from pipelines.rows.schemas import ERRORS, PROMPTS, RESPONSES
from pipelines.rows.served_records import ServedRecord, record_parts, write_records
from tests.pipelines.distill.test_stage import in_this_process


def config_of(storage: Path, base: Path, **changes: Any) -> RunConfig:
    return load_config(None, {
        "storage": str(storage), "name": "new", "base.model": str(base), "base.dtype": "fp32", "prompts.source": "served",
        "distill.max_new_tokens": 20, "distill.workers.threads": 1, "distill.feature_dtype": "fp32", "distill.held_out": 0.3,
        "distill.check_share": 0, **{key.replace("__", "."): value for key, value in changes.items()}})


def record_for(base: Base, text: str, tokens: int = 8, **settings: Any) -> ServedRecord:
    """The record of the base's own answer to `text`."""
    prompt = tuple(base.tokenizer(text).input_ids)
    answer = naive_generate(base, Request("x", prompt, tokens, **settings))
    return ServedRecord(1000.0, prompt, answer.token_ids, answer.finish_reason, settings.get("temperature", 0.0),
                        settings.get("seed", 0), {}, (0,) * (len(answer.token_ids) - 1), str(base.identity), "plain")


@pytest.fixture(scope="module")
def records(tiny_base: Base) -> list[ServedRecord]:
    """Two dozen answers, and one of each kind that is left out."""
    good = [record_for(tiny_base, f"question {number}") for number in range(24)]
    sampled = record_for(tiny_base, "question 3", temperature=1.0, seed=5)
    named = record_for(tiny_base, "my mail is a@example.com")
    moved = record_for(tiny_base, "the base has another name there")
    name, digest = good[0].base.split("@")
    return [*good, sampled, good[5], named, replace(good[6], base=f"{name}@{'0' * 16}:fp32"),
            replace(good[7], base=good[7].base.replace("fp32", "bf16")), replace(good[8], settings={"top_p": 0.5}),
            replace(good[9], settings={"speculative": "lossy-typical"}), replace(moved, base=f"elsewhere@{digest}")]


@pytest.fixture
def served(storage: Path, records: list[ServedRecord]) -> Path:
    """The folder of records in several parts, the last of which was cut off."""
    folder = storage / "served" / "hydra-heads"
    for start in range(0, len(records), 10):
        write_records(folder, records[start:start + 10], 1000.0 + start, "w")
    last = write_records(folder, [records[0], records[1]], 2000.0, "w")
    last.write_bytes(last.read_bytes()[:-9])
    return folder


def test_what_is_used_and_what_is_not(served: Path, storage: Path, tiny_base: Base, tiny_base_dir: Path,
                                      records: list[ServedRecord]) -> None:
    config = config_of(storage, tiny_base_dir, prompts__drop_patterns=[r"[\w.]+@[\w.]+"], distill__max_error_share=0.1)
    folder = storage / "runs" / "new" / "distill"
    counts = read_served(config, folder)
    assert counts["read"] == len(records) + 2 == counts["answers"] + counts["prompt_errors"] + counts["prompts_skipped"]
    assert {name: counts[name] for name in SKIPPED} == {
        "other_base": 2, "not_the_bases": 2, "dropped": 1, "repeated": 2, "beyond_count": 0}
    assert (counts["answers"], counts["prompts"], counts["prompt_errors"]) == (26, 25, 1)
    answered = {tuple(row["prompt_ids"]): row for row in read_parts(folder / "responses", RESPONSES).to_pylist()
                if row["temperature"] == 0}
    for record in records[:24]:
        row = answered[record.prompt_ids]
        assert tuple(row["response_ids"]) == record.response_ids and row["base"] == str(tiny_base.identity)
    prompts = {row["prompt_id"]: row for row in read_parts(folder / "prompts", PROMPTS).to_pylist()}
    assert {row["split"] for row in prompts.values()} == {"train", "held_out"}
    assert all(row["split"] == prompts[row["prompt_id"]]["split"] for row in answered.values())
    assert "question 3" in {row["prompt"] for row in prompts.values()} and "example.com" not in str(prompts)
    (error,) = read_parts(folder / "errors" / "prompts", ERRORS).to_pylist()
    assert "row 2: is cut off" in error["message"]


def test_features_alone_are_computed(served: Path, storage: Path, tiny_base: Base, tiny_base_dir: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """By a forward over prompt and answer; a run that goes on later has the same rows, whatever has come and gone since."""
    monkeypatch.setattr(answers, "run_flow", in_this_process)
    config = config_of(storage, tiny_base_dir, prompts__count=20, distill__max_error_share=0.1)
    folder = storage / "runs" / "new" / "distill"
    counts = read_served(config, folder)
    assert counts["answers"] == 20 and counts["beyond_count"] > 0
    before = [path.name for path in part_files(folder / "responses")]
    for path, _ in record_parts(served):
        path.unlink()
    check_served(config, folder)  # nothing is read again
    assert read_served(config, folder) == counts
    figures = answer_prompts(config, folder, counts["answers"])
    assert (figures["responses"], figures["feature_rows"], figures["errors"]) == (20, 20, 0)
    assert figures["greedy_reproduced"] == 1.0  # they are the base's own answers
    assert [path.name for path in part_files(folder / "responses")] == before
    store = FeatureStore.open(folder / "features", "train")
    row = store.read(0)
    assert torch.allclose(row.hidden, tiny_base.hidden_states([row.token_ids.tolist()])[0], atol=1e-5)


def test_a_killed_reading_is_made_again(served: Path, storage: Path, tiny_base_dir: Path) -> None:
    config, folder = config_of(storage, tiny_base_dir, distill__max_error_share=0.1), storage / "runs" / "new" / "distill"
    counts = read_served(config, folder)
    (folder / COUNTS).unlink()
    next(iter(part_files(folder / "responses"))).unlink()
    assert read_served(config, folder) == counts


def test_long_answers_are_cut_and_long_prompts_are_errors(storage: Path, tiny_base: Base, tiny_base_dir: Path) -> None:
    long = record_for(tiny_base, "long", 60, stop_ids=())
    write_records(storage / "served" / "hydra-heads", [long, replace(long, prompt_ids=(9,) * 250)], 1.0, "w")
    config, folder = config_of(storage, tiny_base_dir, distill__max_error_share=0.5), storage / "runs" / "new" / "distill"
    assert read_served(config, folder)["prompt_errors"] == 1
    (row,) = read_parts(folder / "responses", RESPONSES).to_pylist()
    assert tuple(row["response_ids"]) == long.response_ids[:20] and row["finish_reason"] == "length"
    (error,) = read_parts(folder / "errors" / "prompts", ERRORS).to_pylist()
    assert "250 tokens of a prompt and 20 of its answer are more than the context of 256" in error["message"]


def test_bad_records_are_told(storage: Path, tiny_base: Base, tiny_base_dir: Path) -> None:
    config, folder = config_of(storage, tiny_base_dir), storage / "runs" / "new" / "distill"
    with pytest.raises(InputError, match=r"prompts\.path=.*served/hydra-heads: has no records of answers: start an endpoint"):
        check_served(config, folder)
    good = record_for(tiny_base, "one")
    path = write_records(storage / "served" / "hydra-heads", [good], 1.0, "w")
    check_served(config, folder)
    path.write_text("{}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"1 of 1 rows failed.*row 1: accepted: is missing; remove damaged parts"):
        read_served(config, folder)
    assert not part_files(folder / "responses")
    write_records(storage / "served" / "hydra-heads", [replace(good, settings={"top_k": 4})], 1.0, "w")
    path.unlink()
    with pytest.raises(InputError, match="none of 1 records can be used: 1 not from the base's own distribution"):
        read_served(config, folder)


def test_settings_of_served_prompts(storage: Path, tiny_base_dir: Path) -> None:
    with pytest.raises(InputError, match=r"drop_patterns: '\(' is no regular expression"):
        config_of(storage, tiny_base_dir, prompts__drop_patterns=["("])
    with pytest.raises(InputError, match=r"drop_patterns has no effect with prompts\.source=self"):
        load_config(None, {"prompts.drop_patterns": ["x"]})
    with pytest.raises(InputError, match=r"name that in train\.also"):
        config_of(storage, tiny_base_dir, prompts__self_made=4)
    plain = load_config(None, {"base.model": str(tiny_base_dir), "storage": str(storage)})
    assert "drop_patterns" not in _deciding_settings(plain)["prompts"]  # earlier outputs stay done
    one, other = config_of(storage, tiny_base_dir), config_of(storage, tiny_base_dir, serve__app_name="other")
    assert distill_fingerprint(one) != distill_fingerprint(other)
