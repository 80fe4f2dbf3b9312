"""Few questions stand for all tasks; rows that cannot be decoded are told."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from hydra_core.errors import InputError
from pipelines.bench.questions import load_questions
from pipelines.config import RunConfig, load_config


def spec_bench(path: Path) -> Path:
    """Spec-Bench's format and order: MT-Bench's categories first, the other tasks behind each other."""
    categories = [name for name in ("writing", "roleplay", "math") for _ in range(4)]
    categories += [name for name in ("translation", "rag") for _ in range(20)]
    rows = [{"question_id": number, "category": category, "turns": [f"question {number}"]}
            for number, category in enumerate(categories)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config_for(prompts: Path, base: Path, storage: Path, limit: int | None) -> RunConfig:
    return load_config(None, {"storage": str(storage), "base.model": str(base), "bench.prompts": str(prompts),
                              "bench.limit": limit})


def test_every_task_and_category_in_turn(tiny_base_dir: Path, storage: Path, tmp_path: Path) -> None:
    path = spec_bench(tmp_path / "q.jsonl")
    questions, errors = load_questions(config_for(path, tiny_base_dir, storage, 18))
    assert not errors
    assert Counter(question.category for question in questions) == {"conversation": 6, "translation": 6, "rag": 6}
    conversation = [int(question.id) // 4 for question in questions if question.category == "conversation"]
    assert Counter(conversation) == {0: 2, 1: 2, 2: 2}  # two of each of MT-Bench's
    everything, _ = load_questions(config_for(path, tiny_base_dir, storage, None))
    assert [question.id for question in everything] == [str(number) for number in range(52)]


def test_a_file_without_categories_gives_its_first_rows(tiny_base_dir: Path, storage: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{number}"}) + "\n" for number in range(9)), encoding="utf-8")
    questions, _ = load_questions(config_for(path, tiny_base_dir, storage, 4))
    assert [question.id for question in questions] == ["1", "2", "3", "4"]


def test_rows_that_cannot_be_decoded(tiny_base_dir: Path, storage: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "short"}\n{"other": 1}\n{"prompt": "' + "long " * 100 + '"}\n', encoding="utf-8")
    questions, errors = load_questions(config_for(path, tiny_base_dir, storage, None))
    assert len(questions) == 1 and [error["id"].rsplit(":")[-1] for error in errors] == ["2", "3"]
    path.write_text('{"other": 1}\n', encoding="utf-8")
    with pytest.raises(InputError, match="none of its 1 rows is usable; row 1: has no field `prompt`"):
        load_questions(config_for(path, tiny_base_dir, storage, None))
